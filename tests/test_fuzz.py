"""Configurations are checked before work begins: whatever is typed, a run takes a step or is refused in one line."""

import contextlib
import io
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from forked import Forked
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from test_dhcd import extract, files
from test_emoji import make_emoji_font
from test_experiments import EXPERIMENTS, WRITERS

from ddpm import cli, config
from ddpm.commands.train import training
from ddpm.data.sound import wav_of
from ddpm.figures import plots
from ddpm.runs import checkpoint
from ddpm.training import trainer

REPOSITORY = Path(__file__).parents[1]
CONF = REPOSITORY / "conf"
OTHERS = (
    "ablation",
    "adapter",
    "experiment",
    "guidance",
    "judge",
    "protocol",
    "reader",
    "text",
    "tokenizer",
    "tuning",
)  # no groups of training
GROUPS = sorted(path.name for path in CONF.iterdir() if path.is_dir() and path.name not in OTHERS)

# ---------------------------------------------------------------------------------------------- what is typed

SMALL = {  # of each experiment: no more pixels and widths than its levels and heads need
    "butterflies": ["data.image_size=16"],
    "cars": ["data.image_size=16", "model.head_channels=8"],
    "cifar10_ddpm": ["data.image_size=16"],
    "devanagari": [],
    "devanagari_small": ["data.count=20"],
    "digits": [],
    "digits_short": [],
    "fashion": [],
    "mnist": [],
    "mnist_class": [],
    "mnist_class_channels": [],
    "mnist_dit": [],
    "pictures": ["data.image_size=16", "model.head_channels=8"],
    "points": ["data.count=20", "model.width=8", "model.depth=1"],
}
TINY_UNET = ["model.channels=8", "model.groups=4", "model.blocks=1"]
NETWORKS = {
    "points": [],
    "mnist_dit": ["model.width=8", "model.depth=1", "model.heads=2"],
}  # whose networks are no U-Nets
TINY = [
    "schedule.T=4", "sampler.steps=4", "trainer.steps=1",
    "trainer.epochs=null", "trainer.seconds=null", "trainer.batch_size=2", "trainer.previews=0",
    "recognition=false", "device=cpu",
]  # fmt: skip
SCHEDULES = {
    "cosine": ["schedule.T=4"],
    "linear": ["schedule.T=4", "schedule.rescale=false"],
    "scaled_linear": ["schedule.T=4", "schedule.rescale=false"],
    "sigmoid": ["schedule.T=4"],
    "constant": ["schedule.T=4", "schedule.rescale=false"],
    "geometric": ["schedule.T=4"],
    "betas": ["schedule.beta=[0.1,0.2,0.3,0.4]"],
    "sigmas": ["schedule.sigma=[0.1,0.5,2,10]"],
    "zero_terminal_snr": ["schedule.schedule.T=4", "schedule.schedule.rescale=false", "diffusion.target=v"],
}
DATA = {  # the keys that an experiment may have set for another kind of data
    "digits": ["data.image_size=8", "data.channels=1"],
    "folder": ["data.image_size=8", "data.channels=3"],
    "cifar10": ["data.image_size=8", "data.channels=1"],
    "mnist": ["data.image_size=8", "data.channels=1"],
    "fashion_mnist": ["data.image_size=8", "data.channels=3"],
    "kmnist": ["data.image_size=8", "data.channels=1"],
    "devanagari": ["data.image_size=8", "data.channels=1", "data.count=20"],
    "dhcd": ["data.image_size=8", "data.channels=3"],
    "emoji": ["data.image_size=8", "data.channels=1"],
    "captioned": ["data.image_size=8", "data.channels=3"],
    "scenes": ["data.image_size=8", "data.channels=1", "data.count=20"],
    "subject": ["data.image_size=8", "data.channels=3", "data.count=3"],
    "sound": ["data.image_size=8", "data.channels=1", "data.n_fft=128", "data.hop=32"],
    "spoken_digits": ["data.image_size=8", "data.channels=1", "data.n_fft=128", "data.hop=32", "data.count=10"],
    "hub": ["data.image_size=8", "data.channels=3", "data.name=nowhere.parquet"],  # no such file
    "swiss_roll": ["data.count=20"],
    "moons": ["data.count=20"],
    "gaussians": ["data.count=20"],
    "checkerboard": ["data.count=20"],
    "spiral": ["data.count=20"],
    "rings": ["data.count=20"],
    "pinwheel": ["data.count=20"],
    "mixture": ["data.count=20"],
    "points_file": [],
}
POINTS = {"checkerboard", "gaussians", "mixture", "moons", "pinwheel", "points_file", "rings", "spiral", "swiss_roll"}
NARROW = ["model.channel_mults=[1]", "model.blocks=1", "model.attention_resolutions=[]", "model.patch=1"]

KEYS: dict[str, list[str]] = {  # legal, and on the border: some of them, or some together, are refused
    "model.image_size": ["8", "[8,8]", "[8,16]", "7", "1"],
    "model.in_channels": ["1", "3", "2"],
    "model.out_channels": ["null", "1", "2", "3", "6"],
    "model.channels": ["4", "8", "6", "2", "1"],
    "model.channel_mults": ["[1]", "[1,1]", "[1,2]", "[1,2,1]", "[1,1,1,1,1,1,1]"],
    "model.blocks": ["1", "2", "[1]", "[1,2]", "[1,1,1]"],
    "model.attention_resolutions": ["[]", "[8]", "[4]", "[4,8]", "[16]", "[8,8]"],
    "model.attention": ["full", "linear"],
    "model.heads": ["1", "2", "4", "3", "null"],
    "model.head_channels": ["null", "2", "4", "8", "3"],
    "model.middle_attention": ["true", "false"],
    "model.dropout": ["0", "0.5", "0.999", "1", "1.0"],
    "model.groups": ["1", "2", "4", "8", "3"],
    "model.num_classes": ["null", "10", "3", "1000", "1", "[10]", "[46,1]", "[10,2]", "[]"],
    "model.patch": ["1", "2", "4", "3"],
    "optimizer.amsgrad": ["true", "false"],
    "model.norm_eps": ["1e-6", "1e-12", "1", "1e-30", "0"],
    "model.downsample_padding": ["0", "1", "2"],
    "model.flip_sin_to_cos": ["true", "false"],
    "model.freq_shift": ["0", "1", "0.5", "-1", "4"],
    "model.time_offset": ["0", "-1", "1", "1000"],
    "model.checkpointing": ["true", "false"],
    "model.drop": ["0", "0.1", "0.999", "1"],
    "model.condition_channels": ["0", "1", "3"],
    "model.class_channels": ["0", "4", "1"],
    "model.augment_dim": ["0", "9", "1"],
    "model.magnitude_preserving": ["true", "false"],
    "model.token_channels": ["0", "4", "-1"],
    "model.transformer_layers": ["1", "[1]", "0"],
    "model.linear_projection": ["true", "false"],
    "model.only_cross_attention": ["true", "false", "[true]"],
    "model.any_size": ["true", "false"],
    "model.scale_shift": ["true", "false"],
    "model.resample": ["conv", "resnet", "fir"],
    "model.beside_z": ["true", "false"],
    "model.features": ["2", "1", "3"],
    "model.width": ["8", "1", "2", "6"],
    "model.depth": ["1", "2", "100"],
    "model.out_features": ["null", "2", "4", "1"],
    "model.time": ["sinusoidal", "fourier", "none"],
    "model.fourier_scale": ["0.016", "1e-300", "1e300", "0"],
    "model.energy": ["true", "false"],
    "model.octaves": ["0", "5", "16", "17"],
    "model.codings": ["1", "2", "32", "0"],
    "model.latent_channels": ["1", "4", "0"],
    "model.quant_conv": ["true", "false"],
    "discriminator.image_size": ["8", "4", "[8,16]"],
    "discriminator.in_channels": ["1", "3"],
    "discriminator.channels": ["4", "8", "0"],
    "discriminator.layers": ["null", "1", "3", "0"],
    "discriminator.groups": ["null", "2", "3"],
    "discriminator.num_classes": ["null", "10", "0"],
    "perceptual.channels": ["4", "1", "0"],
    "perceptual.features": ["8", "0"],
    "perceptual.dropout": ["0", "0.5", "1"],
    "perceptual.kind": ["vgg", "alex", "squeeze"],
    "perceptual.files": ["[nowhere]", "[]", "nowhere"],
    "model.codes": ["1", "16", "0"],
    "model.code_channels": ["1", "4", "0"],
    "model.factor": ["2", "4", "3"],
    "model.update": ["average", "gradient", "none"],
    "model.decay": ["0", "0.9", "1"],
    "model.eps": ["0", "1e-5", "-1"],
    "model.size": ["2", "[2,2]", "[1,2,3]"],
    "model.layers": ["1", "3", "0"],
    "model.scale": ["null", "1", "1e-300", "0"],
    "model.mlp_ratio": ["4", "0.5", "1e-300", "1e300", "0"],
    "task.drop": ["0", "0.1", "0.999", "1"],
    "task.prior": ["1", "0", "0.5", "-1"],
    "task.only": ["null", "['model.*']", "['*.weight']", "[]", "['nope']"],
    "task.parts": [
        "{bernoulli:1,kl:1}",
        "{gaussian:1}",
        "{squared:1,ssim:1e300}",
        "{gaussian:1,focal:1}",
        "{nope:1}",
        "{ssim:0.1}",
        "{diffusion:0,huber:1}",
        "{diffusion:0}",
        "{squared:1e300}",
        "{absolute:-1}",
        "{squared:1,perceptual:1}",
    ],
    "task.binarise": ["true", "false"],
    "task.game": ["hinge", "non_saturating", "chess"],
    "task.r1": ["0", "1", "-1"],
    "task.adaptive": ["true", "false"],
    "task.start": ["0", "0.5", "1"],
    "task.revive": ["0", "1", "-1"],
    "task.warmup": ["0", "0.5", "1", "2"],
    "task.free_bits": ["0", "0.1", "1e300", "-1"],
    "task.objective": ["denoising", "explicit", "implicit", "sliced", "sliced_vr", "finite_difference", "nope"],
    "task.projection": ["rademacher", "gaussian", "nope"],
    "task.step": ["0.1", "1e300", "0", "-1"],
    "task.steps": ["1", "2", "[2,1]", "[]", "500"],
    "task.s_0": ["1", "2", "10"],
    "task.s_1": ["10", "20", "1"],
    "task.sigma_min": ["0.002", "1e-300", "80"],
    "task.sigma_max": ["80.0", "1e300", "0.01"],
    "task.P_mean": ["-1.1", "1e300"],
    "task.P_std": ["2.0", "1e-300", "0"],
    "task.c": ["0.00054", "1e300", "0"],
    "task.time_sampling": ["uniform", "stratified", "loss_aware", "lognormal"],
    "task.offset_noise": ["0", "0.1", "-1"],
    "schedule.T": ["1", "2", "4", "10", "1000"],
    "schedule.s": ["0", "0.008", "1", "1e300"],
    "schedule.beta_max": ["0.999", "0.5", "0.999999999", "1", "1e-300"],
    "schedule.beta_1": ["1e-4", "0.5", "1e-16", "1e-300", "0.9999999999999999", "1"],
    "schedule.beta_T": ["0.02", "0.5", "1e-16", "1e-300", "0.9999999999999999", "1"],
    "schedule.rescale": ["true", "false"],
    "schedule.start": ["-3", "0", "-1e300", "3"],
    "schedule.end": ["3", "0", "1e300", "-3"],
    "schedule.tau": ["1", "0.1", "1e-300", "1e300", "0"],
    "schedule.beta": ["0.01", "0.5", "[0.5]", "[0.1,1]", "[1]", "[1,0.1]", "[1e-300]", "0.9999999999999999"],
    "schedule.sigma": ["0.1", "[0.5]", "[1,0.1]", "[0.1,1]", "[1,1]", "[1e-300]", "[]", "[1e5]", "[1e-5,1e5]"],
    "schedule.sigma_min": ["0.01", "1e-5", "0", "1", "10"],
    "schedule.sigma_max": ["10", "1e5", "1e300", "0.01", "80"],
    "schedule.schedule": ["{_target_:ddpm.schedules.cosine,T:3}", "{_target_:ddpm.schedules.linear}", "linear"],
    "diffusion.target": ["eps", "x_0", "v", "flow"],
    "diffusion.variance": ["beta", "beta_tilde", "learned"],
    "diffusion.clip_x_0": ["true", "false"],
    "diffusion.dynamic_threshold": ["null", "0.995", "1", "1e-300", "0"],
    "diffusion.preconditioning": ["null", "edm", "ve"],
    "diffusion.sigma_data": ["0.5", "1", "1e-5", "1e-300", "0"],
    "diffusion.loss": ["simple", "x_0", "snr", "min_snr", "truncated_snr", "snr_plus_one", "p2", "vlb", "hybrid"],
    "diffusion.loss_options": ["{}", "null", "{gamma:2}", "{k:1,gamma:0.5}", "{weight:0.01}", "{gamma:-1}"],
    "sampler.steps": ["null", "1", "2", "3", "4", "5"],
    "sampler.spacing": ["uniform", "trailing", "quadratic", "log_snr", "karras"],
    "sampler.grid": ["integer", "continuous"],
    "sampler.times": ["null", "[4,2]", "[4,3,2,1]", "[3,1,0]", "[0.5]", "[5]", "[2,2]", "[1]", "[1e-300]", "4"],
    "sampler.eta": ["0", "1", "0.5", "1.1"],
    "sampler.order": ["1", "2", "3", "4", "5"],
    "sampler.kind": ["multistep", "singlestep", "sde"],
    "sampler.churn": ["0", "1", "1e300"],
    "sampler.S_min": ["0", "0.1", "1e300"],
    "sampler.S_max": ["null", "1", "50", "1e-300"],
    "sampler.S_noise": ["1", "1.007", "1e-300", "0"],
    "sampler.variant": ["bh1", "bh2"],
    "sampler.corrector": ["true", "false"],
    "sampler.moves": ["1", "2", "0"],
    "sampler.sigma_max": ["80.0", "1e300", "0.01", "0"],
    "sampler.r": ["0.2", "1", "0", "4"],
    "sampler.predictor": ["true", "false"],
    "data.image_size": ["8", "16", "[8,8]", "[8,16]", "1", "[8]", "100000", "[1,10000000000]"],
    "data.channels": ["1", "3", "2"],
    "data.split": ["auto", "train", "test", "all"],
    "data.validation": ["0", "0.5", "0.999", "1e-300", "1"],
    "data.flip": ["true", "false"],
    "data.labels": ["[class]", "[class,style]", "[style]", "[]"],
    "data.condition": ["null", "mask", "low_resolution", "gray", "edges", "depth", "masks"],
    "data.root": ["nowhere", ".", "/dev/null"],
    "data.name": ["null", "mnist", "kmnist", "a/b", "abc"],
    "data.download": ["false"],
    "data.count": ["1", "20", "0", "1000000000000"],
    "data.noise": ["0", "0.1", "100", "101"],
    "data.modes": ["1", "2", "8", "1000"],
    "data.squares": ["2", "4", "3", "64", "66"],
    "data.arms": ["1", "2", "20", "1000"],
    "data.turns": ["0", "1.5", "100", "101"],
    "data.rings": ["1", "4", "1000"],
    "data.grid": ["null", "[5,5]", "[2]", "[1,1]", "[2,2,2]", "[100,100,100]", "[0]", "[]"],
    "data.spacing": ["1", "1e-300", "1e300", "0"],
    "data.means": ["null", "[[0,0],[1,2]]", "[[0],[1,2]]", "[[1e300,0]]", "[]"],
    "data.std": ["null", "0.2", "[0.1,0.2]", "0", "1e-300", "1e300"],
    "data.covariances": ["null", "[[[1,0.5],[0.5,1]]]", "[[[1,0],[0,0]]]", "[[1,0],[0,1]]"],
    "data.weights": ["null", "[0.5,0.5]", "[1]", "[1,-1]", "[0.3,0.3]"],
    "data.fresh": ["true", "false"],
    "data.standardise": ["true", "false"],
    "data.labelled": ["true", "false"],
    "data.seed": ["0", "1", "-1"],
    "data.fonts": ["nowhere", "."],
    "data.font": ["nowhere", ".", "/dev/null"],
    "data.background": ["white", "black", "'#123456'", "rgba(0,0,0,0)"],
    "data.skin_tones": ["true", "false"],
    "data.solids": ["2", "4", "[2,3,4]", "[3,3]", "5", "[]"],
    "data.wording": ["all", "size", "colour", "none"],
    "data.views": ["1", "1000", "0"],
    "data.shape": ["sphere", "cube", "torus"],
    "data.texture": ["stripes", "checks", "plain"],
    "data.colours": ["[red,blue]", "[red,red]", "[red]", "red"],
    "data.word": ["sks", "two words", "''"],
    "data.without": ["[]", "[red cube]", "[red cube,blue cone]", "[red]", "0", "1", "-1"],
    "data.sample_rate": ["8000", "22050", "0", "1", "8000.5"],
    "data.n_fft": ["128", "256", "2", "127"],
    "data.hop": ["32", "64", "128", "0"],
    "data.top_db": ["80", "0.5", "0", "201"],
    "data.n_iter": ["1", "32", "0"],
    "data.short": ["pad", "drop", "error", "cut"],
    "data.broken": ["skip", "error", "no"],
    "data.config": ["null", "a"],
    "data.column": ["auto", "image", "null"],
    "data.label": ["auto", "null", "label"],
    "data.revision": ["null", "main"],
    "augment.p": ["0", "0.12", "1", "1.1"],
    "augment.kinds": ["[]", "[scale]", "[horizontal_flip,vertical_flip]", "[scale,scale]", "[nope]"],
    "augment.stretch": ["0", "0.2", "1", "1e-300"],
    "augment.rotation": ["0", "8", "180", "181"],
    "augment.scale": ["0", "0.1", "1", "1e-300"],
    "augment.translation": ["0", "0.06", "0.5"],
    "augment.elastic": ["0", "1", "100", "1e-300"],
    "augment.elastic_nodes": ["1", "4", "32", "33"],
    "augment.brightness": ["0", "0.1", "1"],
    "augment.contrast": ["0", "0.1", "1"],
    "augment.vertical_flip": ["true", "false"],
    "augment.padding": ["border", "reflection", "zeros"],
    "optimizer.lr": ["1e-3", "0", "1", "1e-300"],
    "optimizer.betas": ["[0.9,0.999]", "[0,0]", "[0.5,0.9999999999999999]", "[0.9,1]"],
    "optimizer.eps": ["1e-8", "0", "1e-300", "1"],
    "optimizer.momentum": ["0.95", "0", "1"],
    "optimizer.least": ["16", "1", "1000", "0"],
    "optimizer.weight_decay": ["0", "0.01", "1", "-0.1"],
    "optimizer.fused": ["true", "false", "null"],
    "trainer.steps": ["1", "2", "1000000", "null"],
    "trainer.epochs": ["null", "0.001", "1", "1e12", "1e300"],
    "trainer.seconds": ["null", "1e-9", "1", "1e12", "1e300"],
    "trainer.batch_size": ["1", "2", "3", "8", "17"],
    "trainer.accumulate": ["1", "2", "3"],
    "trainer.precision": ["auto", "fp32", "bf16", "fp16"],
    "trainer.lr_schedule": ["constant", "cosine", "linear", "triangular"],
    "trainer.lr_cycles": ["1", "4", "0", "1000000"],
    "trainer.warmup": ["0", "1", "1000000000000"],
    "trainer.warmup_epochs": ["null", "1", "1e-300", "1e12", "1e300"],
    "trainer.clip": ["null", "1", "1e-300", "1e300"],
    "trainer.time_sampling": ["uniform", "stratified", "loss_aware", "lognormal"],
    "trainer.offset_noise": ["0", "0.1"],
    "trainer.ema_decay": ["0.9999", "0", "0.9999999999999999", "1"],
    "trainer.ema_warmup": ["0", "9", "1e-300", "1e300"],
    "trainer.log_every": ["1", "20", "1000000000000"],
    "trainer.checkpoint_every": ["1", "1000", "1000000000000"],
    "trainer.keep": ["1", "2", "1000000000000"],
    "trainer.keep_every": ["null", "1000", "1", "1000000000000", "0"],
    "trainer.previews": ["0", "1"],
    "trainer.ema_snapshots": ["0", "1", "256", "257"],
    "trainer.max_skipped": ["0", "10", "1000000000000"],
    "seed": ["0", "1", "-1", "9223372036854775807"],
    "device": ["cpu", "cuda:99", "tpu", "meta"],
    "study": ["default", "a/b", "..", "a b", "''"],
    "init": ["null", "nowhere"],
    "init_text": ["null", "nowhere"],
    "extend": ["null", "nowhere"],
    "recognition": ["true", "false"],
    "slots": ["1", "8"],
    "retry": ["true", "false"],
    "stack": ["null", "seed"],
    "evaluation": [
        "[]",
        "['metric=cost cost.steps=[1]']",
        "['metric=cost cost.samplers=[ddim] cost.steps=[1]']",
        "['metric=[kernel,loss_by_snr] features=pixels n=4 sampler.steps=1']",
        "['metric=nope']",
        "['a b']",
    ],
    "question": ["null", "why"],
    "baseline": ["null", "linear"],
    "compile": ["false"],  # compiling takes a minute, and a test of its own
    "graph": ["auto", "off"],
    "trust": ["[]", "[os.system]", "[nowhere.Net]"],
}
OF_POINTS = {
    *(f"model.{key}" for key in ("features", "width", "depth", "out_features", "time", "fourier_scale", "energy")),
    *(f"data.{key}" for key in ("noise", "modes", "squares", "arms", "turns", "rings", "grid", "spacing", "means")),
    *(f"data.{key}" for key in ("std", "covariances", "weights", "fresh", "standardise", "labelled")),
}
WRONG = [
    "abc", "''", "null", "true", "false", "nan", "inf", "-inf", "-1", "0", "-0.5", "1.5", "1e30", "-1e300", "10000000",
    "-10000000", "99999999999999999999999999", "-9223372036854775808", "1e400", "[]", "[1,2]", "[abc]", "[[1]]",
    "[null]", "[true]", "[-1]", "[10000000]", "[nan]", "{}", "{a:1}", "{a:{b:{c:1}}}", "{1:2}", "[{a:1}]", "x" * 300,
    "x" * 5000, "ü", "'a\nb'", "'\x1b[2J'", "${seed}", "${nowhere}", "'\\${seed}'", "{_target_:os.system}",
    "{_target_:ddpm.schedules.cosine}", "{_target_:torch.optim.Adam}", "???", "[" * 60 + "1" + "]" * 60,
]  # fmt: skip
ODD = [  # no key of conf/ with a value
    "bogus=1", "+bogus=1", "+bogus={a:[1,2]}", "model.bogus=1", "+model.bogus=1", "+schedule.bogus=1", "+diffusion.a=1",
    "+sampler.bogus=null", "+data.bogus=1", "+trainer.bogus=1", "+optimizer.bogus=1", "+optimizer.params=[1]",
    "+diffusion.schedule=1", "+optimizer.amsgrad=true", "+optimizer.maximize=true", "+optimizer.capturable=true",
    "+optimizer.differentiable=true", "+optimizer.foreach=true", "+optimizer.amsgrad=5", "+optimizer.betas=[1]",
    "+model._partial_=true", "+model._args_=[1]", "+model._recursive_=false", "model._target_=models.unet.UNet",
    "model._target_=torch.optim.Adam", "model._target_=models.unet", "model._target_=null", "model._target_=[a]",
    "optimizer._target_=torch.optim.SGD", "optimizer._target_=torch.optim.RMSprop", "schedule._target_=os.system",
    "trainer._target_=ddpm.trainer", "model=nope", "schedule=nope", "diffusion=nope", "sampler=nope", "optimizer=nope",
    "trainer=nope", "data=nope", "experiment=nope", "nope=nope", "+nope=nope", "model=null", "schedule=null",
    "augment=nope", "augment=null", "augment={}", "~augment", "+augment.bogus=1", "+augment._target_=os.system",
    "augment._target_=ddpm.data.Digits",
    "~model", "~schedule", "~diffusion", "~sampler", "~optimizer", "~trainer", "~data", "~experiment", "~nope",
    "model={}", "schedule=[]", "trainer=5", "=5", "model.channels", "model..channels=8", ".=1", "model.channels=[1",
    "model.channels=1,2", "schedule=linear,cosine", "trainer.steps=range(1,3)", "seed=choice(1,2)", "@=1", "a@b=c", "",
    "schedule@schedule.schedule=cosine", "hydra=1", "+a.b.c=1", "seed.x=1", "model.channels.x=1",
]  # fmt: skip


@cache
def conf(group: str, name: str) -> dict[str, Any]:
    keys = yaml.safe_load((CONF / group / f"{name}.yaml").read_text())
    return keys.get(group, keys)  # a task stands beside the groups that it brings


def choices(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def test_every_key_of_every_group_is_drawn():
    keys = {f"{group}.{key}" for group in GROUPS for name in choices(group) for key in conf(group, name)}
    keys |= set(yaml.safe_load((CONF / "train.yaml").read_text())) | {"schedule.schedule"}
    keys -= {"defaults", "hydra", "runs", *(f"{group}.{key}" for group in GROUPS for key in ("_target_", "defaults"))}
    assert keys == KEYS.keys()
    assert set(EXPERIMENTS) == SMALL.keys() and set(choices("schedule")) == SCHEDULES.keys()
    assert set(choices("data")) == DATA.keys()


def chosen_for(key: str) -> list[str]:
    """Words that choose of a group what has this key."""
    group, _, name = key.partition(".")
    having = [choice for choice in choices(group) if name in conf(group, choice)] if group in GROUPS else []
    having.sort(key=lambda choice: group == "data" and choice in POINTS)  # which networks of images do not take
    if key == "schedule.schedule":
        having = ["zero_terminal_snr"]
    if not having or group in ("model", "diffusion", "trainer", "task"):
        return []
    narrow = NARROW if group == "data" and key not in OF_POINTS else []
    return [f"{group}={having[0]}", *narrow, *{"schedule": SCHEDULES, "data": DATA}.get(group, {}).get(having[0], [])]


def changes() -> st.SearchStrategy[list[str]]:
    """Words to type after those of an experiment."""
    keys, others = st.sampled_from(sorted(KEYS)), st.sampled_from(sorted(KEYS.keys() - {"model.channels"}))
    legal = keys.flatmap(lambda key: st.sampled_from(KEYS[key]).map(lambda value: [f"{key}={value}"]))
    wrong = st.builds(
        lambda plus, key, value: [f"{plus}{key}={value}"], st.sampled_from(["", "", "", "+", "++"]), keys,
        st.sampled_from(WRONG) | st.integers().map(str) | st.floats(width=16).map(str) | st.text("a.-_/ 1", max_size=5),
    )  # fmt: skip
    deleted = others.map(lambda key: [f"~{key}"])  # the default of the network's width is no small one
    odd = st.sampled_from(ODD).map(lambda word: [word])
    choice = st.one_of(
        st.sampled_from(sorted(SCHEDULES)).map(lambda name: [f"schedule={name}", *SCHEDULES[name]]),
        st.sampled_from(choices("sampler")).map(lambda name: [f"sampler={name}"]),
        st.sampled_from(choices("optimizer")).map(lambda name: [f"optimizer={name}"]),
        st.sampled_from(choices("augment")).map(lambda name: [f"augment={name}"]),
        st.sampled_from(sorted(DATA)).map(lambda name: [f"data={name}", *NARROW, *DATA[name]]),
    )
    some = st.builds(
        lambda one, words: one + words,
        st.just([]) | st.just([]) | choice.map(lambda one: [one]),
        st.lists(legal, max_size=3),
    )
    one_wrong = st.builds(lambda words, word: [*words, word], some, wrong | deleted | odd)
    return st.one_of(some, one_wrong).map(lambda parts: [word for part in parts for word in part])


@st.composite
def commands(draw: st.DrawFn) -> tuple[str, list[str]]:
    """An experiment's name, and what is typed besides."""
    return draw(st.sampled_from(EXPERIMENTS)), draw(changes())


def command(experiment: str, changed: list[str], data: dict[str, Path]) -> list[str]:
    """All the words, none of which says the same as a later one."""
    chosen = next((word.partition("=")[2] for word in changed if word.startswith("data=")), None)
    root = data.get(experiment if chosen is None else f"data={chosen}", data.get(chosen))
    typed = [f"experiment={experiment}", *SMALL[experiment], *NETWORKS.get(experiment, TINY_UNET), *TINY]
    typed += [f"data.root={root}"] if root else []
    typed += ["data.download=false"] if root and root.name in ("idx", "cifar", "dhcd") else []
    typed += [f"data.fonts={root}"] if root and root.name == "fonts" else []
    typed += [f"data.font={root / 'font.ttf'}"] if root and root.name == "emoji" else []
    schedule = next((word.partition("=")[2] for word in changed if word.startswith("schedule=")), None)
    if schedule is None:
        plain = experiment in ("digits", "mnist", "mnist_class", "mnist_dit", "points")  # whose schedule is the cosine
        typed += SCHEDULES["cosine" if plain else "linear"]
    elif schedule in ("betas", "sigmas", "zero_terminal_snr"):
        typed.remove("schedule.T=4")
    if "experiment=nope" in changed:
        typed = [word for word in typed if not word.startswith("experiment=")]
    later = {word.partition("=")[0].lstrip("+~") for word in changed}
    kept = [word for n, word in enumerate(typed) if word.partition("=")[0] not in later and word not in typed[:n]]
    return [*kept, *changed]


# ---------------------------------------------------------------------------------------------- in this process


class Result(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict[str, Path]:
    """Tiny data for each experiment, and for each choice of the group."""
    base = tmp_path_factory.mktemp("data")
    pictures = WRITERS["cars"](base / "pictures")
    idx, cifar = WRITERS["mnist"](base / "idx"), WRITERS["cifar10_ddpm"](base / "cifar")
    table = base / "points.csv"
    table.write_text("x,y\n" + "".join(f"{n % 7},{n % 3}\n" for n in range(20)))
    captioned = WRITERS["cars"](base / "captioned")
    for path in [*captioned.rglob("*.png"), *captioned.rglob("*.jpg")]:
        path.with_suffix(".txt").write_text("a picture")
    (base / "scenes").mkdir()
    for k in range(4):
        sounds = base / "sounds" / "ab"[k % 2]
        sounds.mkdir(parents=True, exist_ok=True)
        (sounds / f"{k}.wav").write_bytes(
            wav_of(torch.rand(400, generator=torch.Generator().manual_seed(k)) - 0.5, 8000)
        )
    (base / "emoji").mkdir()
    make_emoji_font(base / "emoji" / "font.ttf")
    fonts, dhcd = WRITERS["devanagari_small"](base / "fonts"), extract(base / "dhcd", files(top=""))
    of_experiments = {
        "butterflies": pictures,
        "pictures": pictures,
        "cars": pictures,
        "devanagari": pictures,
        "cifar10_ddpm": cifar,
    }
    return (
        of_experiments
        | {"folder": pictures, "cifar10": cifar, "dhcd": dhcd, "devanagari_small": fonts, "data=devanagari": fonts}
        | {"points_file": table, "emoji": base / "emoji", "captioned": captioned, "scenes": base / "scenes"}
        | {"sound": base / "sounds", "spoken_digits": base / "scenes"}
        | dict.fromkeys(
            ("mnist", "mnist_class", "mnist_class_channels", "mnist_dit", "fashion", "fashion_mnist", "kmnist"), idx
        )
    )


COMPOSE = config.compose
NAMES = {*GROUPS, "experiment"}


@cache
def composed(name: str, groups: tuple[str, ...]) -> DictConfig | config.InvalidInput:
    try:
        return COMPOSE(name, list(groups))
    except config.InvalidInput as error:
        return error


def compose(name: str, overrides: list[str]) -> DictConfig:
    """`config.compose`, which takes longer than a step: what is chosen of the groups is composed once."""
    groups = tuple(word for word in overrides if "@" in word or word.lstrip("+~").partition("=")[0] in NAMES)
    base = composed(name, groups)
    if isinstance(base, config.InvalidInput):
        raise base
    base = base.copy()
    try:
        parsed = OverridesParser.create().parse_overrides([word for word in overrides if word not in groups])
        if any(override.is_sweep_override() or override.is_hydra_override() for override in parsed):
            return COMPOSE(name, overrides)
        ConfigLoaderImpl._apply_overrides_to_config(parsed, base)
    except (HydraException, OmegaConfBaseException) as error:
        raise config.InvalidInput(config._one_line(error)) from error
    except (ValueError, RecursionError):
        return COMPOSE(name, overrides)
    return base


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """An empty folder for runs, seen from another."""
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "there")
    return tmp_path / "here"


@pytest.fixture(scope="module")
def train() -> Iterator[Callable[[list[str]], Result]]:
    """`ddpm-train WORDS`, of two steps at most, without figures, waiting, and checkpoints that nothing reads."""
    patch = pytest.MonkeyPatch()
    composing: list[DictConfig] = []

    def once(name: str, overrides: list[str]) -> DictConfig:
        composing[:] = [compose(name, overrides)]
        task = {"hydra": {"mode": "RUN", "overrides": {"task": list(overrides)}}}
        patch.setattr(HydraConfig.instance(), "cfg", OmegaConf.create(task))
        return composing[0]

    def draw(plan: Any, averaged: Any, source: Any = None) -> None:
        source = training.source_of_results(plan, averaged) if source is None else source
        assert source.samples(2).shape[1:] == plan.data.shape

    def keep(*arguments: Any) -> None:
        if composing[0].get("evaluation"):  # which reads it
            save(*arguments)

    save = checkpoint.save
    ended = trainer.Trainer._ended
    patch.setattr(cli, "compose", once)
    patch.setattr(config, "compose", compose)
    patch.setattr(cli.hydra, "main", lambda **where: lambda job: lambda: job(composing[0]))
    patch.setattr(training, "_draw_results", draw)
    patch.setattr(training, "_print_next", lambda run, ended: None)
    patch.setattr(
        trainer.Trainer, "_ended", lambda self, budget, step, s: ended(self, budget, step, s) if step < 2 else "steps"
    )
    patch.setattr(trainer, "HELD_OUT", 4)
    patch.setattr(plots, "preview", lambda path, rows, title: None)
    patch.setattr("ddpm.runs.directory.git_commit", lambda: None)
    patch.setattr(torch.nn.Module, "compile", lambda model: None)  # which takes a minute
    patch.setattr(checkpoint, "save", keep)

    def train(words: list[str]) -> Result:
        out, err = io.StringIO(), io.StringIO()
        patch.setattr(sys, "argv", ["train", *words])
        code = 0
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                cli.train()
            except SystemExit as end:
                code = end.code or 0
        return Result(code, out.getvalue(), err.getvalue())

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # for such small networks several are slower, by far where others compute
    yield train
    torch.set_num_threads(threads)
    patch.undo()


DIVERGED = re.compile(r"FloatingPointError: (loss or gradient not finite|nothing was learned|the loss scale of fp16)")


def judge(result: Result, left: list[Path]) -> str:
    """The kind of end that a command came to, if it is one of the three that are allowed."""
    told = [line for line in (result.err + result.out).splitlines() if line]
    assert "Traceback" not in result.err + result.out
    if result.code == 2:
        lines = result.err.splitlines()
        assert len(lines) == 1 and lines[0].startswith("error: ") and lines[0].isprintable(), result
        assert not left, f"refused, and yet there is {left}"
        return "refused"
    if result.code == 1:
        assert sum(bool(DIVERGED.search(line)) for line in told) == 1, result
        return "diverged"
    assert result.code == 0, result
    return "trained"


def end_of(run: Callable[[list[str]], Result], data: dict[str, Path], here: Path, words: list[str]) -> str:
    """The kind of end of a command that is typed in an empty folder, which is emptied again."""
    try:
        return judge(run([*words, f"runs={here / 'runs'}"]), [*here.iterdir(), *Path.cwd().iterdir()])
    finally:
        for path in (*here.iterdir(), *Path.cwd().iterdir()):
            shutil.rmtree(path)


@pytest.mark.slow
@pytest.mark.parametrize("group", [*GROUPS, ""])
def test_keys_with_wrong_values(group, train, data, here):
    """A part of the values for each key, and the others for its neighbours: each group meets all of them."""
    of_group = [key for key in sorted(KEYS) if key.rpartition(".")[0] == group]
    parts = min(12, len(of_group))
    for key, value in ((key, value) for i, key in enumerate(of_group) for value in WRONG[i % parts :: parts]):
        command_line = command("points" if key in OF_POINTS else "digits", [*chosen_for(key), f"{key}={value}"], data)
        try:
            end_of(train, data, here, command_line)
        except Exception as error:
            raise AssertionError(f"{key}={value}: {type(error).__name__}: {error}") from error


UNLIKE = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]  # the folder is emptied after each example


@pytest.mark.slow
@settings(max_examples=50, suppress_health_check=UNLIKE)
@given(example=commands())
def test_a_run_takes_a_step_or_is_refused(example, train, data, here):
    event(end_of(train, data, here, command(*example, data)))


@pytest.mark.slow
@pytest.mark.parametrize("part", range(2))  # each with examples of its own, for a process of its own
@settings(max_examples=60, suppress_health_check=UNLIKE)
@given(example=commands())
def test_many_runs_take_a_step_or_are_refused(part, example, train, data, here):
    event(end_of(train, data, here, command(*example, data)))


@pytest.mark.slow
@settings(max_examples=8, suppress_health_check=UNLIKE)
@given(example=commands())
def test_real_processes_take_a_step_or_refuse(example, data, here):
    def run(words: list[str]) -> Result:
        script = str(REPOSITORY / "experiments" / "train.py")
        process = Forked([script, *words, "trainer.steps=1"], {**os.environ, "OMP_NUM_THREADS": "1"})
        return Result(process.wait(), *process.communicate())

    event(end_of(run, data, here, command(*example, data)))
