"""`ddpm-evaluate metric=retrieval`: ranks of pictures by name, of names by picture, of prompts by sample."""

from collections.abc import Iterable
from typing import Any, NamedTuple

from ddpm.commands.console import say
from ddpm.commands.evaluate.context import EvaluationContext, PlannedMeasure
from ddpm.commands.load import load_into, must_walk, open_run_at, task_of
from ddpm.commands.train.words import tokenizer_of
from ddpm.commands.validate import trusted
from ddpm.config import InvalidInput, read_config

NAME = "retrieval"
MOST = 512  # samples of each part by default
AT_A_TIME = 256  # pictures, or texts, encoded in a batch
PARTS = {
    "trained": "pictures that were trained on",
    "held_out": "held-out pictures",
    "composed": "held-out pairs, each half of which was trained on",
}


class Judge(NamedTuple):
    """Encoders of pictures and texts, with their device and precision."""

    model: Any
    tokenizer: Any
    device: Any
    precision: str

    def of_pictures(self, batches: Iterable[Any]) -> Any:
        """Return the embeddings (N, d) of batches of pictures, on the CPU."""
        import torch

        from ddpm.runs.precision import computing

        with torch.no_grad(), computing(self.device, self.precision):
            return torch.cat([self.model.of_pictures(x.to(self.device)).float().cpu() for x in batches])

    def of_texts(self, texts: list[str]) -> Any:
        """Return the embeddings (N, d) of texts, on the CPU."""
        import torch

        from ddpm.runs.precision import computing

        ids = self.tokenizer(texts).split(AT_A_TIME)
        with torch.no_grad(), computing(self.device, self.precision):
            return torch.cat([self.model.of_texts(part.to(self.device)).float().cpu() for part in ids])


class Names(NamedTuple):
    """The distinct captions of some data, and the index of each sample's caption."""

    texts: list[str]
    of: Any  # (N,)

    @classmethod
    def all_of(cls, data: Any) -> "Names":
        import torch

        numbers = {text: number for number, text in enumerate(dict.fromkeys(data.captions))}
        return cls(list(numbers), torch.tensor([numbers[text] for text in data.captions]))


def measure_retrieval(context: EvaluationContext) -> PlannedMeasure:
    """Check that the data have captions and a held-out part; return the planned measure.

    Raises: InvalidInput.
    """
    data = context.every
    if len(data.captions) != len(data):
        raise InvalidInput(f"metric={NAME} compares pictures with their names, and {data.name} has no captions")
    if not len(data.held_out):
        raise InvalidInput(f"metric={NAME}: {data.name} has no held-out part (data.validation=0)")
    return _planned_samples(context) if context.source.draws else _planned_pairs(context)


def _parts(context: EvaluationContext) -> dict[str, Any]:
    """Return the numbers of held-out samples, with held-out pairs as a part of their own; at most `n` of each part."""
    import torch

    from ddpm.data.dataset import spread
    from ddpm.metrics.scenes import parts_of

    data = context.every
    parts = parts_of(data.held_out, getattr(data, "composed", torch.empty(0)))
    parts = {"composed" if part == "composed" else "held_out": numbers for part, numbers in parts.items()}
    most = context.config.n or (MOST if context.source.draws else len(data))
    return {part: numbers[spread(len(numbers), most)] for part, numbers in parts.items()}


# -------------------------------------------------------------------------------------------------------- encoders


def _planned_pairs(context: EvaluationContext) -> PlannedMeasure:
    if context.config.judge_run is not None:
        raise InvalidInput(
            "judge_run is for runs that draw samples, but this run compares pictures and texts itself; leave it out"
        )
    data = context.every
    plan = f"{NAME}: {len(data):,} {data.units} and their names are encoded and compared, both ways"
    return PlannedMeasure(plan, 0, lambda: _compare(context))


def _compare(context: EvaluationContext) -> None:
    """Record the ranks of pictures' names among all names, and of names' pictures among all pictures."""
    import torch

    from ddpm.data.dataset import spread
    from ddpm.metrics import retrieval

    source, data = context.source, context.every
    judge = Judge(source.model, context.data.tokenizer, source.device, source.precision)
    names = Names.all_of(data)
    u = judge.of_pictures(data.batch(part).x for part in torch.arange(len(data)).split(AT_A_TIME))
    v = judge.of_texts(names.texts)
    parts = _parts(context)
    most = max(map(len, parts.values()))
    train = data.train.cpu()
    for part, numbers in ({"trained": train[spread(len(train), most)]} | parts).items():
        queries = names.of[numbers].unique()
        ways = {
            "name": retrieval.found(u[numbers], v, names.of[numbers], torch.arange(len(v))),
            "picture": retrieval.found(v[queries], u, queries, names.of),
        }
        for way, found in ways.items():
            _record(
                context,
                f"{part}-{way}",
                "",
                len(found.ranks),
                {context.config.seed: retrieval.results(way, found)},
                part,
            )


def _record(
    context: EvaluationContext, what: str, judge: str, n: int, measured: dict[int, dict[str, Any]], part: str
) -> None:
    """Record what was counted with each seed."""
    from ddpm.metrics import quality

    for name in next(iter(measured.values())):
        each = [by_name[name] for by_name in measured.values()]
        values = context.settings(n, context.source.sampler) | quality.together(each, list(measured))
        context.record(f"{NAME}_{what}-{name}{judge}_{n}", values, f"{PARTS[part]}: {quality.in_words(each, values)}")


# ---------------------------------------------------------------------------------------------------------- samples


def _planned_samples(context: EvaluationContext) -> PlannedMeasure:
    from ddpm.data.batch import takes

    source = context.source
    if "tokens" not in takes(source.model) or source.condition_data is None:
        raise InvalidInput(
            f"metric={NAME} compares samples with their prompts, and the run was trained without words; train one with "
            "experiment=text_emoji or text_scenes"
        )
    must_walk(source.sampler, source.diffusion)
    judge, name = _judge_of(context)
    parts = _parts(context)
    count = len(context.seeds) * sum(map(len, parts.values()))
    of_each = " and ".join(f"{len(numbers):,} samples of the names of {PARTS[part]}" for part, numbers in parts.items())
    plan = f"{NAME}: {of_each}, seeds {context.seeds}, {source.walk}, compared by {context.config.judge_run}"
    return PlannedMeasure(plan, count * source.evaluations, lambda: _find(context, judge, name, parts))


def _judge_of(context: EvaluationContext) -> tuple[Judge, str]:
    """Return the encoders of the run that `judge_run` names, and the start of their checksum.

    Raises: InvalidInput.
    """
    from ddpm.runs import checkpoint

    config, source = context.config, context.source
    named = config.judge_run
    if named is None:
        raise InvalidInput(
            f"metric={NAME} compares samples by another run: give judge_run=RUN, trained with "
            "experiment=contrastive_emoji or contrastive_scenes"
        )
    run, folder = open_run_at(str(named), "judge_run")
    task, tokenizer = task_of(read_config(run.path / "config.yaml"), trusted(config)), tokenizer_of(run.path)
    model = task.modules.get("model")
    if tokenizer is None or not hasattr(model, "of_texts"):
        raise InvalidInput(
            f"judge_run={named}: {type(task).__name__} does not compare pictures with texts; take a run of "
            "task=contrastive"
        )
    if tuple(model.shape) != source.decoded_shape:
        raise InvalidInput(
            f"judge_run={named} compares pictures of (C, H, W) = {tuple(model.shape)}, but samples are "
            f"{source.decoded_shape}; train one on pictures of that shape"
        )
    weights = checkpoint.weights_of(folder, averaged=True)["model"]
    load_into(model, weights)
    known = run.status().get("data") or {}
    if known.get("sha256") != context.every.identity()["sha256"]:
        say(f"warning: judge_run={named} was trained on data other than the present {context.every.name}")
    model.to(source.device).eval()
    return Judge(model, tokenizer, source.device, "fp32"), checkpoint.sha256(weights)[:6]


def _find(context: EvaluationContext, judge: Judge, name: str, parts: dict[str, Any]) -> None:
    """Record the ranks of samples' prompts among all names, with those of held-out pictures as the ceiling."""
    import torch

    from ddpm.metrics import retrieval

    data = context.every
    names = Names.all_of(data)
    v, indices = judge.of_texts(names.texts), torch.arange(len(names.texts))
    for part, numbers in parts.items():
        real = judge.of_pictures(data.batch(some).x for some in numbers.split(AT_A_TIME))
        ceiling = retrieval.found(real, v, names.of[numbers], indices)
        measured = {}
        for seed in context.seeds:
            x, _ = context.samples(list(range(len(numbers))), seed, conditions_of=numbers)
            u = judge.of_pictures(x.split(AT_A_TIME))
            if broken := int((~u.isfinite().all(1)).sum()):
                raise InvalidInput(f"metric={NAME}: {broken} of {len(x)} samples hold NaN or infinity")
            measured[seed] = retrieval.results("drawn", retrieval.found(u, v, names.of[numbers], indices), ceiling)
        _record(context, f"{part}-drawn", f"_contrastive-{name}", len(numbers), measured, part)
