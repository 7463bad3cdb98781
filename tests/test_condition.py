"""ddpm/data/batch.py's Condition, and how the U-Net of models/unet.py takes one, in closed forms."""

import pytest
import torch
from torch import Tensor, nn

from ddpm.data.batch import PARTS, Batch, Condition, labels_of, takes
from ddpm.randomness import generator
from models.embeddings import ClassEmbedding, parts_of
from models.unet import UNet

B = 4


def unet(image_size: int | tuple[int, int] = 8, **options) -> UNet:
    small = {"in_channels": 2, "channels": 8, "channel_mults": (1, 2), "blocks": 1, "groups": 4}
    return UNet(image_size, **small | {"attention_resolutions": [4], "dropout": 0.0} | options)


def randomised(net: UNet) -> UNet:
    """No parameter is zero, so every path matters; in double precision, where the size of a batch does not."""
    for p in net.parameters():
        nn.init.normal_(p, std=0.3)
    return net.double()


def inputs(n: int = B, channels: int = 2, size: tuple[int, int] = (8, 8)) -> tuple[Tensor, Tensor]:
    return torch.randn(n, channels, *size).double(), torch.linspace(1, 900, n).round()


def close(one: Tensor, other: Tensor):
    torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


CLASSES, IMAGE = torch.tensor([2, 0, 1, 2]), torch.randn(B, 3, 8, 8, generator=generator(0, "image")).double()
SOME, ALL, NONE = torch.tensor([True, False, False, True]), torch.ones(B).bool(), torch.zeros(B).bool()


# --- A condition: rows, null rows, what a network takes


def full(n: int = B) -> Condition:
    """A condition with every part, whose values tell their rows."""
    rows = torch.arange(n)
    return Condition(
        classes=rows,
        tokens=rows[:, None] + torch.arange(5),
        image=rows[:, None, None, None].expand(n, 1, 2, 2).float(),
        mask=torch.ones(n, 5).bool(),
        null={"classes": rows % 2 == 0, "image": rows == 1},
    )


def test_rows_are_taken_of_every_part_its_mask_and_its_null_rows():
    taken = torch.tensor([3, 1])
    some = full().rows(lambda x: x[taken])
    assert some.classes.tolist() == [3, 1] and some.tokens[:, 0].tolist() == [3, 1]
    assert some.image[:, 0, 0, 0].tolist() == [3, 1] and some.mask.shape == (2, 5)
    assert {name: rows.tolist() for name, rows in some.null.items()} == {
        "classes": [False, False],
        "image": [False, True],
    }
    empty = Condition().rows(lambda x: x[taken])
    assert empty.parts == () and empty.classes is None and empty.null == {}

    batch = Batch(torch.arange(B).float(), full()).rows(lambda x: x[taken])
    assert batch.x.tolist() == [3, 1] and len(batch) == 2 and batch.y.tolist() == [3, 1]
    assert Batch(torch.zeros(3)).y is None and Batch(torch.zeros(3)).condition.parts == ()


def test_all_of_it_goes_to_a_device():
    there = Batch(torch.zeros(B), full()).to("meta")
    tensors = [there.x, *(getattr(there.condition, name) for name in (*PARTS, "mask")), *there.condition.null.values()]
    assert len(tensors) == 7 and all(x.device.type == "meta" for x in tensors)


def test_nulled_adds_to_the_rows_that_are_null():
    def told(condition: Condition) -> dict[str, list[bool]]:
        return {name: rows.tolist() for name, rows in condition.null.items()}

    whole, part = full(), Condition(classes=CLASSES, image=IMAGE)
    everywhere = [True] * B
    assert told(whole.nulled()) == dict.fromkeys(PARTS, everywhere)
    assert told(part.nulled()) == {"classes": everywhere, "image": everywhere}
    assert told(part.nulled(SOME)) == {"classes": SOME.tolist(), "image": SOME.tolist()}
    assert told(part.nulled({"image": SOME, "tokens": ALL})) == {"image": SOME.tolist()}
    assert told(whole.nulled({"classes": SOME})) == {
        "classes": [True, False, True, True],
        "image": [False, True, False, False],
    }
    assert told(whole) == {"classes": [True, False, True, False], "image": [False, True, False, False]}  # as it was
    assert Condition().nulled().null == {}
    assert part.nulled(SOME).classes is CLASSES and part.nulled(SOME).image is IMAGE


def test_of_several_labels_each_can_be_null_and_a_row_nulls_all():
    labels = Condition(classes=torch.arange(6).reshape(3, 2))
    row, one = torch.tensor([True, False, False]), torch.tensor([[False, False], [False, True], [False, False]])
    both = [[True, True], [False, True], [False, False]]
    assert labels.nulled(row).null["classes"].tolist() == [[True, True], [False, False], [False, False]]
    assert labels.nulled({"classes": one}).nulled(row).null["classes"].tolist() == both
    assert labels.nulled(row).nulled({"classes": one}).null["classes"].tolist() == both
    by_row = Condition(classes=labels.classes, null={"classes": row})
    assert by_row.nulled({"classes": one}).null["classes"].tolist() == both
    square = Condition(classes=torch.arange(4).reshape(2, 2), null={"classes": torch.tensor([True, False])})
    assert square.nulled(torch.zeros(2).bool()).null["classes"].tolist() == [[True, True], [False, False]]


def test_labels_that_are_null_stand_beside_such_that_are_not():
    labels = Condition(classes=torch.arange(4).reshape(2, 2))
    one = labels.nulled({"classes": torch.tensor([[False, True], [False, False]])})
    expected = [[False, True], [False, False], [False, False], [False, False]]
    assert one.concat(labels).null["classes"].tolist() == expected
    assert labels.concat(one).null["classes"].tolist() == expected[2:] + expected[:2]
    by_row = Condition(classes=labels.classes, null={"classes": torch.tensor([True, False])})
    assert by_row.concat(labels).null["classes"].tolist() == [[True, True], *[[False, False]] * 3]


def test_null_rows_are_where_their_part_is():
    """Coins are drawn on one device, and fall for parts on another."""
    assert full().to("meta").dropped(0.5, generator(0, "condition")).null["tokens"].device.type == "meta"
    assert full().to("meta").nulled().null["classes"].device.type == "meta"


@pytest.mark.parametrize("drop", [0.1, 0.5, 0.9])
def test_each_part_of_each_row_is_dropped_by_its_own_coin(drop):
    """Of n independent coins the share that falls is drop, with a standard error of sqrt(drop (1 - drop) / n)."""
    n = 40_000
    condition = Condition(classes=torch.zeros(n), tokens=torch.zeros(n, 1), image=torch.zeros(n, 1, 1, 1))
    null = condition.dropped(drop, generator(3, "condition", 7)).null
    assert tuple(null) == PARTS and all(rows.shape == (n,) and rows.dtype == torch.bool for rows in null.values())

    def share(rows: Tensor, expected: float):
        assert abs(rows.double().mean() - expected) < 4 * (expected * (1 - expected) / n) ** 0.5

    for rows in null.values():
        share(rows, drop)
        share(rows[1:] & rows[:-1], drop**2)
    share(null["classes"] & null["tokens"], drop**2)
    share(null["classes"] & null["image"], drop**2)
    share(null["tokens"] & null["image"], drop**2)
    share(null["classes"] & null["tokens"] & null["image"], drop**3)


def test_drops_are_keyed_and_one_part_leaves_the_draws_of_the_others():
    n = 100
    parts = {"classes": torch.zeros(n), "tokens": torch.zeros(n, 2), "image": torch.zeros(n, 1, 1, 1)}

    def dropped(*names: str, step: int = 1, drop: float = 0.3) -> dict[str, Tensor]:
        given = Condition(**{name: parts[name] for name in names})
        return dict(given.dropped(drop, generator(0, "condition", step)).null)

    whole = dropped(*PARTS)
    for names in (PARTS, *[(name,) for name in PARTS], ("classes", "image")):
        some = dropped(*names)
        assert some.keys() == set(names) and all(torch.equal(some[name], whole[name]) for name in names)
        assert all(not torch.equal(rows, whole[name]) for name, rows in dropped(*names, step=2).items())
    more = dropped(*PARTS, drop=0.6)  # the same coins, so what falls at 0.3 falls at 0.6 too
    assert all((more[name] | ~whole[name]).all() and more[name].sum() > whole[name].sum() for name in PARTS)


def test_drop_0_drops_nothing_drop_1_all_and_null_rows_stay_null():
    coins = generator(0, "condition")
    given = full()
    assert given.dropped(0.0, coins) is given
    assert Condition(classes=CLASSES).dropped(0.0, coins).null == {}  # a network without a learned null takes it
    assert Condition().dropped(0.5, coins).null == {}
    assert all(rows.all() for rows in full().dropped(1.0, coins).null.values())
    after = full().dropped(0.5, coins).null
    assert (after["classes"] | ~full().null["classes"]).all() and after["image"][1]


class Takes(nn.Module):
    def __init__(self, *parts: str):
        super().__init__()
        self.takes = parts


def test_a_network_is_given_what_it_takes():
    condition = full()
    assert condition.for_network(nn.Identity()) is None and condition.for_network(Takes()) is None
    assert (
        Condition().for_network(Takes("classes")) is None
        and Condition(image=IMAGE).for_network(Takes("classes")) is None
    )

    taken = condition.for_network(Takes("classes"))  # null somewhere
    assert taken.parts == ("classes",) and taken.null.keys() == {"classes"} and taken.mask is None
    assert Condition(classes=CLASSES, image=IMAGE).for_network(Takes("classes")) is CLASSES
    assert Condition(classes=CLASSES, null={"image": SOME}).for_network(Takes("classes")) is CLASSES

    taken = condition.for_network(Takes("tokens"))
    assert taken.parts == ("tokens",) and taken.mask is condition.mask and taken.null == {}
    taken = condition.for_network(Takes(*PARTS))
    assert all(getattr(taken, name) is getattr(condition, name) for name in (*PARTS, "mask"))
    assert taken.null == condition.null
    taken = Condition(classes=CLASSES).for_network(Takes("classes", "image"))
    assert taken is CLASSES  # the network says what it misses


def test_what_networks_take():
    assert takes(unet()) == () and takes(unet(drop=0.1)) == ()
    assert takes(unet(num_classes=3)) == ("classes",) and takes(unet(condition_channels=3)) == ("image",)
    assert takes(unet(num_classes=3, condition_channels=3, drop=0.5)) == ("classes", "image")
    older = nn.Identity()  # a network that says nothing of itself
    assert takes(older) == () and takes(lambda x, t: x) == ()
    older.num_classes = 3
    assert takes(older) == ("classes",)
    assert unet((8, 12), condition_channels=3, attention_resolutions=[6]).shape == (2, 8, 12)


def test_networks_take_what_taken_by_gives_them():
    condition = Condition(classes=CLASSES, image=IMAGE, tokens=torch.zeros(B, 5)).nulled(SOME)
    x, t = inputs()
    for options in ({}, {"num_classes": 3}, {"condition_channels": 3}, {"num_classes": 3, "condition_channels": 3}):
        net = randomised(unet(**options, drop=0.2))
        assert net(x, t, condition.for_network(net)).shape == x.shape


# --- Classes


def test_classes_alone_and_in_a_condition_are_the_same_to_the_bit():
    for drop in (0.0, 0.3):
        net, (x, t) = randomised(unet(num_classes=3, drop=drop)), inputs()
        assert torch.equal(net(x, t, CLASSES), net(x, t, Condition(classes=CLASSES)))
    assert torch.equal(net(x, t, CLASSES), net(x, t, Condition(classes=CLASSES, null={"classes": NONE})))
    plain = randomised(unet())
    assert torch.equal(plain(x, t), plain(x, t, Condition())) and torch.equal(plain(x, t), plain(x, t, None))


def test_the_null_of_classes_is_one_more_class():
    net, more = randomised(unet(num_classes=3, drop=0.1)), unet(num_classes=4).double()
    weights = net.state_dict()
    null = weights.pop("class_embedding.null")
    weights["class_embedding.weight"] = torch.cat([weights["class_embedding.weight"], null[None]])
    more.load_state_dict(weights)
    (x, t), condition = inputs(), Condition(classes=CLASSES)
    assert torch.equal(net(x, t, condition.nulled()), more(x, t, torch.full((B,), 3)))
    assert torch.equal(net(x, t, condition.nulled(SOME)), more(x, t, CLASSES.masked_fill(SOME, 3)))


def test_where_it_is_null_the_class_does_not_matter_and_may_be_none():
    net, (x, t) = randomised(unet(num_classes=3, drop=0.1)), inputs()
    out = net(x, t, Condition(classes=CLASSES, null={"classes": SOME}))
    other = CLASSES.masked_fill(SOME, -1)
    assert torch.equal(out, net(x, t, Condition(classes=other, null={"classes": SOME})))


def test_class_embedding_is_an_embedding_and_a_vector():
    torch.manual_seed(5)
    plain, after = nn.Embedding(3, 6), torch.rand(2)
    for null in (False, True):
        torch.manual_seed(5)
        embed = ClassEmbedding(3, 6, null)
        assert torch.equal(embed.weight, plain.weight) and torch.equal(torch.rand(2), after)
        assert torch.equal(embed(CLASSES), plain(CLASSES))
        assert list(embed.state_dict()) == ["weight", "null"][: 1 + null]
    nn.init.normal_(embed.null)
    expected = [embed.null if n else plain.weight[c] for c, n in zip(CLASSES, SOME, strict=True)]
    assert torch.equal(embed(CLASSES, SOME), torch.stack(expected))
    with pytest.raises(ValueError, match=r"task\.drop > 0 makes one"):
        ClassEmbedding(3, 6)(CLASSES, SOME)


# --- Several labels at once

LABELS = torch.tensor([[2, 0], [0, 1], [1, 1], [2, 1]])


@pytest.mark.parametrize("options", [{}, {"class_channels": 4}], ids=str)
def test_of_several_labels_the_vectors_are_added(options):
    """So the network is one of all pairs as classes, whose vectors are the sums."""
    net = randomised(unet(num_classes=[3, 2], drop=0.1, **options))
    pairs = unet(num_classes=6, drop=0.1, **options).double()
    weights = {name: p for name, p in net.state_dict().items() if not name.startswith("class_embedding")}
    first, second = net.class_embedding
    weights["class_embedding.weight"] = torch.cat([first.weight + row for row in second.weight])
    weights["class_embedding.null"] = first.null + second.null
    pairs.load_state_dict(weights)
    (x, t), condition = inputs(), Condition(classes=LABELS)
    one = Condition(classes=LABELS[:, 0] + 3 * LABELS[:, 1])
    assert net.num_classes == (3, 2) and takes(net) == ("classes",) and labels_of(net) == (3, 2)
    close(net(x, t, LABELS), pairs(x, t, one.classes))
    close(net(x, t, condition), pairs(x, t, one))
    close(net(x, t, condition.nulled(SOME)), pairs(x, t, one.nulled(SOME)))
    close(net(x, t, Condition(classes=LABELS, null={"classes": SOME})), pairs(x, t, one.nulled(SOME)))


def test_each_label_can_be_null_without_the_others():
    net, (x, t) = randomised(unet(num_classes=[3, 2], drop=0.1)), inputs()
    single = torch.zeros(B, 2).bool()
    single[1, 0] = single[2, 1] = True
    out = net(x, t, Condition(classes=LABELS).nulled({"classes": single}))
    other = LABELS.masked_fill(single, -1)  # of a null label no value is looked at
    assert torch.equal(out, net(x, t, Condition(classes=other).nulled({"classes": single})))
    whole = net(x, t, LABELS)
    close(out[[0, 3]], whole[[0, 3]])
    assert (out - whole)[1:3].abs().amax((1, 2, 3)).min() > 1e-3


def test_labels_are_dropped_together_and_one_by_one():
    n, drop = 40_000, 0.2
    condition = Condition(classes=torch.zeros(n, 3).long())
    null = condition.dropped(drop, generator(3, "condition")).null["classes"]
    row = Condition(classes=torch.zeros(n).long()).dropped(drop, generator(3, "condition")).null["classes"]
    assert null.shape == (n, 3) and null[row].all()  # the coin of the row is as ever
    single = null[~row].double()
    for share, expected in ((single.mean(0), drop), (single.prod(1).mean(), drop**3)):
        assert (share - expected).abs().max() < 4 * (expected / len(single)) ** 0.5


def test_one_label_is_one_however_it_is_written_and_another_number_is_refused():
    (x, t), net = inputs(), unet(num_classes=[3])
    assert net.num_classes == 3 and net.state_dict().keys() == unet(num_classes=3).state_dict().keys()
    with pytest.raises(ValueError, match=r"classes have shape \(4,\); this network takes 2 labels a row, \(B, 2\)"):
        unet(num_classes=[3, 2]).double()(x, t, CLASSES)
    with pytest.raises(ValueError, match=r"null rows of classes .* of shape \(4, 3\); allowed: .* of shape \(4, 2\)"):
        condition = Condition(classes=LABELS, null={"classes": torch.zeros(B, 3).bool()})
        unet(num_classes=[3, 2], drop=0.1).double()(x, t, condition)
    for wrong, message in (([], "num_classes is empty"), ([3, 0], r"num_classes\[1\] = 0 must"), ([3, "a"], "must be")):
        with pytest.raises(ValueError, match=message):
            unet(num_classes=wrong)


# --- Classes as channels


def test_channels_of_a_class_are_its_vector_at_every_pixel():
    """The network is that of in_channels + 4 channels, fed the concatenation: of x_t, the classes, the image."""
    for options in ({}, {"patch": 2, "channel_mults": (1,)}, {"condition_channels": 3}):
        net = randomised(unet(num_classes=3, class_channels=4, **options))
        channels = options.get("condition_channels", 0)
        plain = unet(in_channels=6 + channels, out_channels=2, **options | {"condition_channels": 0}).double()
        weights = net.state_dict()
        vectors = weights.pop("class_embedding.weight")
        plain.load_state_dict(weights)
        assert vectors.shape == (3, 4)
        x, t = inputs()
        image = IMAGE[:, :channels]
        spread = vectors[CLASSES][:, :, None, None].expand(B, 4, 8, 8)
        condition = Condition(classes=CLASSES, image=image) if channels else CLASSES
        assert torch.equal(net(x, t, condition), plain(torch.cat([x, spread, image], dim=1), t))


def test_channels_of_a_class_tell_one_class_from_another_and_from_none():
    net, (x, t) = randomised(unet(num_classes=3, class_channels=4, drop=0.1)), inputs(1)
    told = [net(x, t, torch.tensor([y])) for y in range(3)]
    told.append(net(x, t, Condition(classes=CLASSES[:1]).nulled()))
    assert net.class_embedding.null.shape == (4,) and takes(net) == ("classes",)
    assert all((told[i] - told[j]).abs().max() > 1e-3 for i in range(4) for j in range(i))
    assert torch.equal(told[3], net(x, t, Condition(classes=torch.tensor([-1])).nulled()))
    with pytest.raises(ValueError, match=r"task\.drop > 0 makes one"):
        unet(num_classes=3, class_channels=4).double()(x, t, Condition(classes=CLASSES[:1]).nulled())


def test_channels_of_classes_are_of_a_network_that_has_classes():
    with pytest.raises(ValueError, match="class_channels = 4 are those of classes: set num_classes"):
        unet(class_channels=4)


# --- Images


@pytest.mark.parametrize(
    "options",
    [{}, {"patch": 2, "channel_mults": (1,)}, {"num_classes": 3}, {"out_channels": 1}],
    ids=str,
)
def test_an_image_is_further_channels_of_x_t(options):
    """The network is that of in_channels + C' channels, fed the concatenation."""
    net = randomised(unet(condition_channels=3, **options))
    plain = unet(**{"in_channels": 5, "out_channels": 2} | options).double()
    plain.load_state_dict(net.state_dict())
    x, t = inputs()
    y = CLASSES if net.num_classes else None
    out = net(x, t, Condition(classes=y, image=IMAGE))
    assert out.shape[1] == options.get("out_channels", 2)
    assert torch.equal(out, plain(torch.cat([x, IMAGE], dim=1), t, y))
    assert (out - net(x, t, Condition(classes=y, image=IMAGE + 1))).abs().amax((1, 2, 3)).min() > 1e-3


def test_the_null_of_an_image_is_a_constant_a_channel():
    for patch in (1, 2):
        options = {"patch": patch, "condition_channels": 3, "attention_resolutions": []}
        net = randomised(unet((8, 12), drop=0.1, **options))
        assert net.null_image.shape == (3,)
        plain = unet((8, 12), **options).double()
        plain.load_state_dict({name: p for name, p in net.state_dict().items() if name != "null_image"})
        (x, t), image = inputs(size=(8, 12)), torch.randn(B, 3, 8, 12).double()
        constant = net.null_image.detach()[:, None, None].expand(3, 8, 12)
        for null in (SOME, ALL, NONE):
            replaced = torch.stack([constant if n else row for row, n in zip(image, null, strict=True)])
            out = net(x, t, Condition(image=image, null={"image": null}))
            assert torch.equal(out, plain(x, t, Condition(image=replaced)))
        image[SOME] = torch.nan  # what is under a null does not matter
        assert net(x, t, Condition(image=image, null={"image": SOME})).isfinite().all()


def test_an_image_takes_the_type_of_x_t():
    net, (x, t) = randomised(unet(condition_channels=1, drop=0.1)), inputs()
    mask = torch.rand(B, 1, 8, 8) < 0.5
    for null in ({}, {"image": SOME}):
        expected = net(x, t, Condition(image=mask.double(), null=null))
        for image in (mask, mask.long(), mask.float()):
            assert torch.equal(net(x, t, Condition(image=image, null=null)), expected)
    single = net.float()(x.float(), t, Condition(image=mask.double(), null={"image": SOME}))
    assert single.dtype == torch.float32


# --- Null rows


BOTH = {"num_classes": 3, "condition_channels": 3, "drop": 0.2}


def test_a_mixed_batch_is_its_rows_apart():
    net, (x, t) = randomised(unet(**BOTH)), inputs()
    null = {"classes": SOME, "image": torch.tensor([True, True, False, False])}
    condition = Condition(classes=CLASSES, image=IMAGE, null=null)
    out = net(x, t, condition)
    for i in range(B):
        row = condition.rows(lambda value, i=i: value[i : i + 1])
        close(net(x[i : i + 1], t[i : i + 1], row), out[i : i + 1])
    free, bound = net(x, t, condition.nulled()), net(x, t, Condition(classes=CLASSES, image=IMAGE))
    close(out[0], free[0])
    close(out[2], bound[2])
    assert min((out[i] - other[i]).abs().max() for i in (1, 3) for other in (free, bound)) > 1e-3


def test_the_nulls_learn_from_null_rows_and_the_others_do_not():
    net, (x, t) = randomised(unet(**BOTH)), inputs()

    def gradients(null: dict[str, Tensor], row: int) -> dict[str, Tensor]:
        """Of the output's square in one row."""
        net.zero_grad()
        net(x, t, Condition(classes=CLASSES, image=IMAGE, null=null))[row].square().sum().backward()
        return {name: p.grad.clone() for name, p in net.named_parameters()}

    for row in range(B):
        of = gradients({"classes": SOME, "image": ~SOME}, row)
        assert bool(of["class_embedding.null"].all()) == bool(of["class_embedding.null"].any()) == bool(SOME[row])
        assert bool(of["null_image"].all()) == bool(of["null_image"].any()) == (not SOME[row])
        learned = of["class_embedding.weight"].any(1)
        assert learned.tolist() == [not SOME[row] and c == CLASSES[row] for c in range(3)]
    for rows, learned in ((ALL, True), (NONE, False)):
        of = gradients({"classes": rows, "image": rows}, 0)
        assert of["null_image"].any() == of["class_embedding.null"].any() == learned


def test_null_rows_need_a_learned_null():
    x, t = inputs()
    for name, options in (("classes", {"num_classes": 3}), ("image", {"condition_channels": 3})):
        part = {"classes": CLASSES, "image": IMAGE}[name]
        message = "trained with drop = 0 and has no null condition; task.drop > 0 makes one"
        for null in (SOME, NONE):  # no value is looked at
            with pytest.raises(ValueError, match=message):
                unet(**options).double()(x, t, Condition(**{name: part}, null={name: null}))
        others = {"classes": SOME, "tokens": SOME, "image": SOME}
        del others[name]  # of parts that are not there
        unet(**options).double()(x, t, Condition(**{name: part}, null=others))


def test_null_rows_of_another_shape_or_type():
    x, t = inputs()
    wrong = [SOME[:, None], SOME[:2], SOME.float(), torch.tensor(True)]
    for name, options in (("classes", {"num_classes": 3}), ("image", {"condition_channels": 3})):
        for null in wrong:
            condition = Condition(**{name: {"classes": CLASSES, "image": IMAGE}[name]}, null={name: null})
            with pytest.raises(ValueError, match=rf"null rows of {name} are torch.* allowed: torch.bool of shape \(4,"):
                unet(**options, drop=0.1).double()(x, t, condition)


# --- Parts that are missing, or not taken


@pytest.mark.parametrize(
    ("options", "y", "message"),
    [
        ({"num_classes": 3}, None, "num_classes = 3, y is missing"),
        ({"num_classes": 3}, Condition(), "num_classes = 3, y is missing"),
        ({"num_classes": 3, "condition_channels": 3}, Condition(image=IMAGE), "num_classes = 3, y is missing"),
        ({}, CLASSES, "num_classes = None, y is given"),
        ({}, Condition(classes=CLASSES), "num_classes = None, y is given"),
        ({}, Condition(image=IMAGE), "condition_channels = 0, image is given"),
        ({"num_classes": 3}, Condition(classes=CLASSES, image=IMAGE), "condition_channels = 0, image is given"),
        ({"condition_channels": 3}, None, "condition_channels = 3, image is missing"),
        ({"condition_channels": 3}, Condition(null={"image": ALL}), "condition_channels = 3, image is missing"),
        ({"condition_channels": 3, "num_classes": 3}, CLASSES, "condition_channels = 3, image is missing"),
        ({}, Condition(tokens=torch.zeros(B, 7)), r"tokens of shape \(4, 7\) are given, but this network takes none"),
        (
            {"num_classes": 3},
            Condition(classes=torch.zeros(B, 2).long()),
            r"classes have shape \(4, 2\); this network takes one class a row, \(B,\)",
        ),
        ({"num_classes": 3}, torch.zeros(B, B).long(), r"classes have shape \(4, 4\)"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_parts_must_be_given_exactly_when_the_network_takes_them(options, y, message):
    with pytest.raises(ValueError, match=message):
        unet(**options).double()(*inputs(), y)


@pytest.mark.parametrize("shape", [(4, 2, 8, 8), (4, 3, 8, 4), (1, 3, 8, 8), (5, 3, 8, 8), (4, 3, 8), (3, 8, 8)])
def test_images_of_another_shape(shape):
    message = rf"image has shape \({', '.join(map(str, shape))}\); this network takes \(4, 3, 8, 8\)"
    with pytest.raises(ValueError, match=message):
        unet(condition_channels=3).double()(*inputs(), Condition(image=torch.zeros(shape)))


def test_parts_are_unpacked_with_their_null_rows():
    assert parts_of(None, None) == parts_of(Condition(), None) == {}
    assert parts_of(CLASSES, 3) == {"classes": (CLASSES, None)}
    condition = Condition(classes=CLASSES, image=IMAGE, null={"image": SOME})
    assert parts_of(condition, 3, 3, drop=0.1) == {"classes": (CLASSES, None), "image": (IMAGE, SOME)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"drop": 1.0}, r"drop = 1 must lie in \[0, 1\)"),
        ({"drop": -0.1}, "drop = -0.1 must"),
        ({"drop": float("nan")}, "drop = nan must"),
        ({"condition_channels": -1}, "condition_channels = -1 must be an integer >= 0"),
        ({"condition_channels": 1.5}, "condition_channels = 1.5 must"),
        ({"condition_channels": True}, "condition_channels = True must"),
        ({"condition_channels": 2**40}, f"condition_channels = {2**40} must .* at most 1,048,576"),
        ({"num_classes": 3, "class_channels": -1}, "class_channels = -1 must be an integer >= 0"),
        ({"num_classes": 3, "class_channels": 4.0}, "class_channels = 4.0 must be an integer >= 0"),
    ],
    ids=str,
)
def test_arguments_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        unet(**options)


# --- Without a condition nothing has changed


def test_a_network_has_the_parameters_of_what_it_takes():
    plain, first = unet().state_dict(), unet(num_classes=3).state_dict()
    assert first.keys() - plain.keys() == {"class_embedding.weight"} and plain.keys() <= first.keys()
    assert unet(drop=0.1).state_dict().keys() == unet(condition_channels=3).state_dict().keys() == plain.keys()
    assert unet(num_classes=3, drop=0.1).state_dict().keys() - first.keys() == {"class_embedding.null"}
    assert unet(condition_channels=3, drop=0.1).state_dict().keys() - plain.keys() == {"null_image"}
    assert unet(**BOTH).state_dict().keys() - first.keys() == {"class_embedding.null", "null_image"}
    assert {name for name, _ in unet(num_classes=3).named_parameters()} == first.keys()  # no buffer is stored

    with torch.device("meta"):
        counts = [
            sum(p.numel() for p in UNet(32, **options).parameters())
            for options in ({}, {"drop": 0.1}, {"num_classes": 10}, {"num_classes": 10, "drop": 0.1})
        ]
        more = sum(p.numel() for p in UNet(32, condition_channels=2, drop=0.1).parameters())
    assert counts == [35_746_307] * 2 + [35_746_307 + 10 * 512, 35_746_307 + 11 * 512]
    assert more == 35_746_307 + 2 * 9 * 128 + 2


def test_a_learned_null_draws_nothing_and_is_0_at_first():
    ends = []
    for drop in (0.0, 0.3):
        torch.manual_seed(11)
        net = unet(num_classes=3, condition_channels=2, drop=drop)
        ends.append((net.state_dict(), torch.rand(4)))
    (without, after), (weights, also) = ends
    assert torch.equal(after, also) and all(torch.equal(p, weights[name]) for name, p in without.items())
    assert not weights["class_embedding.null"].any() and not weights["null_image"].any()


# --- Devices, layouts, checkpointing, compilation

FORMS = [BOTH, BOTH | {"class_channels": 4}]


@pytest.mark.parametrize("options", FORMS, ids=str)
def test_checkpointing_changes_nothing_of_a_conditional_network(options):
    plain, saving = randomised(unet(**options)), unet(**options, checkpointing=True).double()
    saving.load_state_dict(plain.state_dict())
    (x, t), ends = inputs(), []
    for net in (plain.train(), saving.train()):
        out = net(x, t, Condition(classes=CLASSES, image=IMAGE).nulled(SOME))
        out.square().mean().backward()
        ends.append([out, *(p.grad for p in net.parameters())])
    assert all(torch.equal(one, other) for one, other in zip(*ends, strict=True))


@pytest.mark.parametrize("options", FORMS, ids=str)
def test_channels_last_and_16_bits(options):
    net = randomised(unet(**options)).float().eval()
    (x, t), condition = inputs(), Condition(classes=CLASSES, image=IMAGE.float()).nulled(SOME)
    x, expected = x.float(), net(x.float(), t, condition)
    net.to(memory_format=torch.channels_last)
    last = x.contiguous(memory_format=torch.channels_last)
    for images in (x, last):
        torch.testing.assert_close(net(images, t, condition), expected, rtol=1e-3, atol=1e-3)
    with torch.autocast("cpu", torch.bfloat16):
        assert net(last, t, condition).dtype == torch.bfloat16


@pytest.mark.parametrize("options", FORMS, ids=str)
def test_on_paper(options):
    with torch.device("meta"):
        net = unet(**options)
    condition = Condition(classes=CLASSES, image=IMAGE).nulled(SOME).to("meta")  # no value is looked at
    out = net(torch.zeros(B, 2, 8, 8, device="meta"), torch.ones(B, device="meta"), condition)
    assert out.shape == (B, 2, 8, 8) and out.device.type == "meta"


@pytest.mark.slow
@pytest.mark.parametrize("options", FORMS, ids=str)
def test_compiled_in_one_graph(options):
    net, (x, t) = randomised(unet(**options)), inputs()
    compiled = torch.compile(net, fullgraph=True, backend="eager")
    for null in (SOME, ALL, ~SOME):
        condition = Condition(classes=CLASSES, image=IMAGE).nulled(null)
        close(compiled(x, t, condition), net(x, t, condition))
    assert takes(compiled) == ("classes", "image")
