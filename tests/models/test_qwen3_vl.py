"""Features, positions and logits against transformers' Qwen3VLForConditionalGeneration with the same random weights;
stars against full prompts; every implementation against the default."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
from flax import nnx

from benchmarks.publisher_vl import Prompt, PublishedVL
from jaxrank import convert
from jaxrank.errors import CheckpointError, UnsupportedError
from jaxrank.kernels.rotary import rotary
from jaxrank.media.grid import mrope_positions
from jaxrank.models import settings_of
from jaxrank.models.qwen3 import Qwen3
from jaxrank.models.qwen3_vl import Qwen3VLConfig
from jaxrank.models.vision import Vision, VisionConfig
from jaxrank.runtime.packing import pack
from jaxrank.runtime.patch_packing import cut_features, pack_patches
from jaxrank.runtime.programs import compile_in_parts, compile_whole, take_tower, whole_tower
from jaxrank.types import Encoded, MediaTokens, Packed, Patches
from jaxrank.weights import converted as checkpoint
from tests.checkpoints import make_qwen3_vl

CONFIGS: dict[str, dict[str, Any]] = {
    "two deepstack layers": {},
    "three, the last layer among them, untied": dict(
        tied=False, text=dict(num_hidden_layers=6), vision=dict(deepstack_visual_indexes=[1, 2, 3])
    ),
    "8B's heads": dict(
        text=dict(
            head_dim=128,
            rope_parameters=dict(
                rope_type="default", rope_theta=5e6, mrope_section=[24, 20, 20], mrope_interleaved=True
            ),
        ),
        vision=dict(hidden_size=144, num_heads=2, num_position_embeddings=2304, deepstack_visual_indexes=[2]),
    ),
}
MERGE = 2
ROW = 512


def image(rng: np.random.Generator, height: int, width: int) -> Patches:
    return Patches(rng.uniform(-1, 1, (height * width, 1536)).astype(np.float32), (1, height, width))


def video(rng: np.random.Generator, frames: int, height: int, width: int) -> Patches:
    """Random frames; the last of an odd number stands twice, as the published processor has it."""
    values = rng.uniform(-1, 1, (frames, 3, height // 2, 2, 16, width // 2, 2, 16)).astype(np.float32)
    values = np.concatenate([values, values[-1:]]) if frames % 2 else values
    steps = len(values) // 2
    pairs = values.reshape(steps, 2, *values.shape[1:]).transpose(0, 3, 6, 4, 7, 2, 1, 5, 8)
    return Patches(pairs.reshape(-1, 1536), (steps, height, width), tuple(2.0 * i + 0.5 for i in range(steps)))


class Writer:
    """Token ids of random text and media in any order, as the published processor writes them."""

    def __init__(self, published: PublishedVL, seed: int) -> None:
        self.published, self.rng = published, np.random.default_rng(seed)

    def text(self, count: int) -> np.ndarray:
        return self.rng.integers(0, 500, count).astype(np.int32)

    def part(self, part: int | Patches) -> np.ndarray:
        """A number of text tokens, or a piece of media between marks, a video's steps behind their times."""
        if isinstance(part, int):
            return self.text(part)
        steps, height, width = part.grid
        pad = self.published.video_id if part.seconds else self.published.image_id
        pads = np.full(height * width // MERGE**2, pad, np.int32)
        pieces = []
        for _ in range(steps):
            pieces += [self.text(4 if part.seconds else 0), self.text(1), pads, self.text(1)]
        return np.concatenate(pieces)

    def prompt(self, *parts: int | Patches) -> Prompt:
        ids = np.concatenate([self.part(part) for part in parts])
        return Prompt(ids, tuple(part for part in parts if isinstance(part, Patches)))


def join(*prompts: Prompt) -> Prompt:
    return Prompt(np.concatenate([p.ids for p in prompts]), tuple(one for p in prompts for one in p.media))


class Ours:
    """The model of a folder, its tower apart, and rows with media put together by hand."""

    def __init__(
        self,
        folder: Path,
        published: PublishedVL,
        dtype: str = "float32",
        whole: bool = False,
        quantization: str | None = None,
    ) -> None:
        self.published = published
        model = convert.load(folder, dtype=dtype, quantization=quantization)
        self.config: Qwen3VLConfig = model.config
        self.tower = take_tower(model)
        self.compile = (compile_whole if whole else compile_in_parts)(model)
        self.program: Any = None
        self.run_tower = jax.jit(lambda row: self.tower(row))

    def features(self, media: Sequence[Patches], patches: int = 1024) -> np.ndarray:
        row = pack_row(self.tower.config, media, patches)
        made = np.asarray(self.run_tower(row)).astype(np.float32)
        return np.concatenate(cut_features(made, [one.grid for one in media], MERGE))

    def here(self, ids: np.ndarray) -> np.ndarray:
        return (ids == self.published.image_id) | (ids == self.published.video_id)

    def row(self, prefix: Prompt | None, documents: list[Prompt], tokens: int = ROW) -> Packed:
        """One row, the prefix first, then documents in order."""
        shared = prefix.ids if prefix else np.zeros(0, np.int32)
        row = pack([Encoded(d.ids, len(d.ids) - 1, prefix=shared) for d in documents], tokens, causal=True)
        positions, at, start = np.zeros((3, tokens), np.int32), 0, 0
        for i, prompt in enumerate([prefix, *documents] if prefix else documents):
            assert prompt is not None
            grids = [one.grid for one in prompt.media]
            mine, after = mrope_positions(self.here(prompt.ids), grids, merge=MERGE, start=start)
            start = after if prefix and i == 0 else start
            positions[:, at : at + len(prompt.ids)] = mine
            at += len(prompt.ids)
        media = [one for prompt in ([prefix] if prefix else []) + documents for one in prompt.media]
        here = self.here(np.asarray(row.tokens)) & (np.arange(tokens) < at)
        features = np.zeros((tokens, self.config.vision.features, self.config.text.width), np.float32)
        if media:
            features[here] = self.features(media)
        return replace(row, positions=positions, media=MediaTokens(here, features))

    def logits(self, prefix: Prompt | None, documents: list[Prompt]) -> np.ndarray:
        row = self.row(prefix, documents)
        self.program = self.program or self.compile(row)
        return np.asarray(self.program(row))[: len(documents)]


def pack_row(config: VisionConfig, media: Sequence[Patches], patches: int, implementation: str | None = None) -> Any:
    return pack_patches(
        media, patches, values=config.values, merge=config.merge, side=config.side, implementation=implementation
    )


def some_media(rng: np.random.Generator) -> list[Patches]:
    """Several sizes and shapes, one of them video of an odd number of frames."""
    return [image(rng, 4, 6), video(rng, 5, 6, 4), image(rng, 2, 20), image(rng, 14, 12), image(rng, 2, 2)]


Case = tuple[Path, PublishedVL, Ours]


@pytest.fixture(scope="module", params=CONFIGS.values(), ids=list(CONFIGS))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = make_qwen3_vl(tmp_path_factory.mktemp("qwen3_vl"), **request.param)
    published = PublishedVL(folder)
    return folder, published, Ours(folder, published)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = make_qwen3_vl(tmp_path_factory.mktemp("tiny"))
    published = PublishedVL(folder)
    return folder, published, Ours(folder, published)


class TestTower:
    def test_features(self, case: Case) -> None:
        """The main ones and every deepstack layer's, of images and video side by side."""
        _, published, ours = case
        media = some_media(np.random.default_rng(0))
        want, got = published.features(media), ours.features(media)
        assert got.shape == want.shape == (sum(len(one.pixels) for one in media) // 4, ours.config.vision.features, 64)
        assert want.std(0).min() > 0.1, "tokens that hardly differ would prove nothing: 500 times the tolerance"
        assert np.abs(got - want).max() <= 2e-4

    def test_a_still_alone_and_in_a_row(self, tiny: Case) -> None:
        _, _, ours = tiny
        media = some_media(np.random.default_rng(1))
        alone = np.concatenate([ours.features([one], 256) for one in media])
        assert np.abs(ours.features(media) - alone).max() <= 1e-5

    def test_steps_of_a_video_do_not_see_each_other(self, tiny: Case) -> None:
        _, _, ours = tiny
        clip = video(np.random.default_rng(2), 6, 4, 4)
        one, other = clip.pixels.copy(), clip.pixels.copy()
        other[16:] = 0
        first, second = (ours.features([replace(clip, pixels=pixels)])[:4] for pixels in (one, other))
        assert np.array_equal(first, second)

    def test_a_long_row_goes_piece_by_piece(self, tmp_path: Path) -> None:
        """A few heads at a time, and rows in runs."""
        folder = make_qwen3_vl(tmp_path, vision=dict(num_heads=8))
        published, rng = PublishedVL(folder), np.random.default_rng(3)
        media = [image(rng, 50, 30), *some_media(rng)]
        assert np.abs(Ours(folder, published).features(media, 4096) - published.features(media)).max() <= 2e-4

    def test_stacked_stages(self, tiny: Case) -> None:
        """What accelerators run."""
        folder, published, _ = tiny
        tower, state = whole_tower(convert.load(folder, dtype="float32").vision)
        media = some_media(np.random.default_rng(4))
        row = pack_row(settings_of(convert.read_config(folder))[1].vision, media, 1024)
        want = published.features(media)
        assert np.abs(np.asarray(tower(state, row))[: len(want)] - want).max() <= 2e-4

    @pytest.mark.parametrize("implementation", ["tpu-interpreted", "triton-interpreted"])
    @pytest.mark.parametrize("width, heads", [(256, 4), (144, 2)], ids=["heads of 64", "heads of 72"])
    def test_implementations(self, implementation: str, width: int, heads: int) -> None:
        config = VisionConfig(
            width=width, layers=2, heads=heads, ffn=64, out_width=32, side=6, merge=2, patch=4, steps=2, channels=3,
            theta=1e4, deepstack=(0,),
        )  # fmt: skip
        rng = np.random.default_rng(5)
        media = [Patches(rng.normal(size=(n * 8, 96)).astype(np.float32), (1, 4, 2 * n)) for n in (10, 1, 20)]

        def features(implementation: str | None) -> np.ndarray:
            tower = Vision(config, dtype="float32", rngs=nnx.Rngs(0), implementation=implementation)
            for place in [*tower.stages[0], *tower.stages[1]]:
                place.attention.qkv.kernel[...] *= 10  # scores that differ
            row = pack_row(config, media, 512, implementation)
            return np.asarray(jax.jit(lambda row: tower(row))(row))[: 31 * 2]

        want = features(None)
        assert want.std(0).min() > 1e-3
        assert np.abs(features(implementation) - want).max() <= 1e-4 * want.std()


class TestRotary:
    def test_three_equal_positions_are_one(self) -> None:
        positions = np.array([0, 3, 7, 500], np.int32)
        plain = rotary(positions, 128, 5e6)
        three = rotary(np.stack([positions] * 3), 128, 5e6, (24, 20, 20))
        assert all(np.array_equal(a, b) for a, b in zip(plain, three, strict=True))

    def test_each_axis_has_its_share(self) -> None:
        positions = np.zeros((3, 3), np.int32) + 7 * np.eye(3, dtype=np.int32)
        turned = np.asarray(rotary(positions, 128, 5e6, (24, 20, 20)).sin)[:, 64:] != 0
        assert turned.sum(1).tolist() == [24, 20, 20]
        assert (turned.sum(0) == 1).all()


class TestParity:
    @pytest.mark.parametrize(
        "parts",
        [
            lambda m: [(30, m[0], 12), (9, m[2], 7), (5, m[3], 1)],
            lambda m: [(30, m[1], 12), (3, m[1], m[0], 7)],
            lambda m: [(4, m[0], m[2], 9, m[1], 6, m[4], 11), (6, m[1], m[3], 8), (20,)],
        ],
        ids=["one image each", "video", "mixed in any order"],
    )
    def test_logits(self, case: Case, parts: Any) -> None:
        _, published, ours = case
        media = some_media(np.random.default_rng(6))
        write = Writer(published, 7)
        prompts = [write.prompt(*each) for each in parts(media)]
        want = np.array([published.logit(prompt) for prompt in prompts])
        assert np.abs(ours.logits(None, prompts) - want).max() <= 2e-4
        blank = [replace(p, media=tuple(replace(m, pixels=m.pixels * 0) for m in p.media)) for p in prompts if p.media]
        dark = np.array([published.logit(prompt) for prompt in blank])
        assert np.abs(dark - want[: len(dark)]).min() > 0.02, "pixels must matter: 100 times the tolerance"

    def test_a_star_with_an_image_in_the_prefix(self, case: Case) -> None:
        """Documents of text, an image and a video go on behind the positions of the prefix."""
        _, published, ours = case
        media = some_media(np.random.default_rng(8))
        write = Writer(published, 9)
        prefix = write.prompt(20, media[3], 3)
        documents = [
            write.prompt(25), write.prompt(4, media[0], 5), write.prompt(2, media[1], 6),
            write.prompt(media[2], 9, media[4], 2), write.prompt(1),
        ]  # fmt: skip
        full = [join(prefix, document) for document in documents]
        want = np.array([published.logit(prompt) for prompt in full])
        assert want.std() > 0.2, "logits that hardly differ would prove nothing: 1,000 times the tolerance"
        assert np.abs(ours.logits(prefix, documents) - want).max() <= 2e-4
        assert np.abs(np.concatenate([ours.logits(None, [p]) for p in full]) - want).max() <= 2e-4

    def test_as_one_program_with_a_scan_over_layers(self, tiny: Case) -> None:
        folder, published, ours = tiny
        write = Writer(published, 10)
        media = some_media(np.random.default_rng(11))
        documents = [write.prompt(4, media[0], 5), write.prompt(2, media[1], 6)]
        got = Ours(folder, published, whole=True).logits(None, documents)
        assert np.abs(got - ours.logits(None, documents)).max() <= 1e-5

    def test_bfloat16(self, tiny: Case) -> None:
        """Closer to float32 than transformers' own bfloat16 is."""
        folder, published, _ = tiny
        write, rng = Writer(published, 12), np.random.default_rng(13)
        prompts = [write.prompt(9, image(rng, 4, 2 * n), n, video(rng, n, 4, 4), 5) for n in range(1, 9)]
        want = np.array([published.logit(prompt) for prompt in prompts])
        rounded = PublishedVL(folder, torch.bfloat16)
        theirs = np.array([rounded.logit(prompt) for prompt in prompts])
        halved = Ours(folder, published, "bfloat16")
        mine = np.concatenate([halved.logits(None, [prompt]) for prompt in prompts])
        assert np.abs(mine - want).mean() < np.abs(theirs - want).mean()


class TestTextAlone:
    def test_equals_qwen3(self, tiny: Case) -> None:
        """The same weights in the plain model: text rows take its path, with positions [T] and no media."""
        folder, published, ours = tiny
        model = convert.load(folder, dtype="float32")
        adding = len(model.adding)
        values = {}
        for path, value in checkpoint.parameters(model).items():
            head, _, rest = path.partition("/")
            if head in ("adding", "layers"):
                index, _, rest = rest.partition("/")
                values[f"layers/{int(index) + (adding if head == 'layers' else 0)}/{rest}"] = value
            elif head != "vision":
                values[path] = value
        outline = nnx.eval_shape(lambda: Qwen3(model.config.text, dtype="float32", rngs=None))
        plain = checkpoint.assemble(outline, values)
        rng = np.random.default_rng(14)
        prefix = rng.integers(0, 500, 30).astype(np.int32)
        pairs = [Encoded(rng.integers(0, 500, n).astype(np.int32), n - 1, prefix=prefix) for n in (20, 50, 7)]
        row = pack(pairs, 256, causal=True)
        got = np.asarray(ours.compile(row)(row))
        assert np.abs(got - np.asarray(compile_in_parts(plain)(row)(row))).max() <= 1e-6
        want = [published.logit(Prompt(np.concatenate([prefix, pair.tokens]), ())) for pair in pairs]
        assert np.abs(got[:3] - want).max() <= 2e-4

    def test_programs_do_not_carry_the_tower(self, tiny: Case) -> None:
        folder, _, _ = tiny
        model = convert.load(folder, dtype="float32")
        everything = len(checkpoint.parameters(model))
        tower = take_tower(model)
        assert len(checkpoint.parameters(tower)) > 20
        assert len(checkpoint.parameters(model)) == everything - len(checkpoint.parameters(tower))
        assert take_tower(model) is None


class TestConfig:
    @pytest.fixture
    def config(self, tiny: Case) -> dict[str, Any]:
        return convert.read_config(tiny[0])

    def test_old_and_new_files(self, config: dict[str, Any]) -> None:
        """Older files keep rotary settings as rope_theta and rope_scaling, and none for the tower."""
        text = {name: value for name, value in config["text_config"].items() if name != "rope_parameters"}
        text |= {
            "rope_theta": 5_000_000,
            "rope_scaling": {"mrope_interleaved": True, "mrope_section": [4, 2, 2], "rope_type": "default"},
        }
        vision = {name: value for name, value in config["vision_config"].items() if name != "rope_parameters"}
        old = Qwen3VLConfig.read({**config, "text_config": text, "vision_config": vision})
        assert old == Qwen3VLConfig.read(config)
        assert (old.text.theta, old.vision.theta, old.sections) == (5e6, 1e4, (4, 2, 2))
        assert (old.max_length, old.default_length, old.vocab_size, old.text.tied) == (262_144, 10_240, 600, True)

    @pytest.mark.parametrize(
        "half, change, message",
        [
            ("text_config", {"attention_bias": True}, "attention_bias = True (implemented: False)"),
            ("text_config", {"rope_scaling": {"mrope_interleaved": False}, "rope_parameters": None, "rope_theta": 1e6},
             "mrope_interleaved = False (implemented: True)"),
            ("text_config", {"head_dim": 32}, "mrope_section [4, 2, 2] does not share out the 16 frequencies"),
            ("text_config", {"num_hidden_layers": 2}, "leaves no layer after those that add the features of 2"),
            ("text_config", {"hidden_size": 32}, "vision_config.out_hidden_size = 64 (implemented: 32)"),
            ("vision_config", {"hidden_act": "silu"}, "vision_config.hidden_act = 'silu'"),
            ("vision_config", {"num_position_embeddings": 40}, "num_position_embeddings = 40 (implemented: 36)"),
            ("vision_config", {"deepstack_visual_indexes": [2, 0]}, "deepstack_visual_indexes = (2, 0)"),
            ("vision_config", {"deepstack_visual_indexes": [4]}, "deepstack_visual_indexes = (4,)"),
            ("vision_config", {"num_heads": 3}, "hidden_size 64 is not num_heads 3 times a multiple of 4"),
            ("vision_config", {"rope_parameters": {"rope_type": "linear"}}, "vision_config.rope_type = 'linear'"),
        ],
    )  # fmt: skip
    def test_what_is_not_computed_is_refused_by_name(
        self, config: dict[str, Any], half: str, change: dict[str, Any], message: str
    ) -> None:
        with pytest.raises(UnsupportedError) as caught:
            Qwen3VLConfig.read({**config, half: {**config[half], **change}})
        assert message in str(caught.value)

    def test_sizes_are_checked_in_both_halves(self, config: dict[str, Any]) -> None:
        for half, field in (("text_config", "intermediate_size"), ("vision_config", "patch_size")):
            with pytest.raises(CheckpointError, match=r"the model's (ffn|patch) would be 0"):
                settings_of({**config, half: {**config[half], field: 0}})
