# SPDX-License-Identifier: Apache-2.0
import dataclasses
import json
from typing import Any

import pytest
import torch
from parity import FOLDER
from torch import Tensor
from unet_dump import TOLERANCE, dump, length_mask, off, weights

from tts_align.models.cosyvoice.flow.model import UNetFlow, UNetFlowSizes, load_flow
from tts_align.models.flow.dit import DiTFlow, DiTFlowSizes
from tts_align.models.flow.token_flow import FlowDraws, FlowPrompt, Given

SMALL = UNetFlowSizes(
    codebook_size=11,
    mel_channels=4,
    speaker_channels=5,
    token_channels=6,
    lookahead=2,
    width=8,
    heads=2,
    feed_forward=12,
    blocks=1,
    up_blocks=1,
    chunk_tokens=3,
    unet_width=8,
    unet_time_width=10,
    unet_blocks=1,
    unet_mid_levels=1,
    unet_heads=2,
    unet_head_channels=3,
    unet_feed_forward=16,
    chunk_frames=6,
)
OTHERS = [
    SMALL,
    dataclasses.replace(SMALL, heads=4, blocks=2, up_blocks=0, unet_heads=1, unet_mid_levels=0, lookahead=0),
    dataclasses.replace(
        SMALL, mel_channels=7, frames_per_token=3, width=12, token_channels=5, codebook_size=6, unet_blocks=2
    ),
]


class AsPublished(UNetFlow):
    """Leaves padding as the embedding makes it, like the published code."""

    def condition(
        self,
        vectors: Tensor,
        mask: Tensor,
        streaming: bool = False,
        final: bool = True,
        voice: Tensor | None = None,
    ) -> Tensor:
        return self.encoder_proj(self.encoder.encode_embedded(self.encoder.embed(vectors), mask, streaming, final))


def yaml_of_dump() -> dict[str, Any]:
    """What the dump's config says, in the structure of the published yaml."""
    config = json.loads((FOLDER / "flow_v2" / "config.json").read_text())
    return {"flow": {"encoder": config["encoder"], "decoder": {"estimator": config["estimator"]}}}


def yaml_of(sizes: UNetFlowSizes) -> dict[str, Any]:
    """What the weights do not tell, as the published yaml says it."""
    unet = {"num_heads": sizes.unet_heads, "attention_head_dim": sizes.unet_head_channels}
    unet |= {"static_chunk_size": sizes.chunk_frames}
    return {"flow": {"encoder": {"static_chunk_size": sizes.chunk_tokens}, "decoder": {"estimator": unet}}}


def published(kind: type[UNetFlow] = UNetFlow) -> UNetFlow:
    assert dump()
    flow = kind(UNetFlowSizes.of(weights(), yaml_of_dump())).eval()
    flow.load_state_dict(weights())
    return flow


def make(sizes: UNetFlowSizes = SMALL, seed: int = 0) -> UNetFlow:
    torch.manual_seed(seed)
    return UNetFlow(sizes).double().eval()


def training(name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Arguments of ``loss``, and what the published code makes of them."""
    io = dump()
    own = {key.removeprefix(f"{name}."): value for key, value in io.items() if key.startswith(f"{name}.")}
    draws = FlowDraws(
        time=own["t"].flatten(),
        noise=own["z"].transpose(1, 2),
        prompt=(own["cond"].abs().sum(1) > 0).sum(1),
        keep=own["cfg_uniform"] > 0.2,
        streaming=bool(own["streaming"]),
    )
    given = {
        "tokens": io["train.speech_token"],
        "token_mask": length_mask(io["train.speech_token_len"]),
        "mel": io["train.speech_feat"],
        "mel_mask": length_mask(io["train.speech_feat_len"]),
        "speaker": io["train.embedding"],
        "draws": draws,
    }
    return given, own


def gradient_norm(flow: UNetFlow) -> Tensor:
    return torch.stack([value.grad.norm() for value in flow.parameters() if value.grad is not None]).norm()


def utterances(sizes: UNetFlowSizes, lengths: list[int], seed: int = 0) -> dict[str, Tensor]:
    """Arguments of ``sample``."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(lengths), max(lengths))
    return {
        "tokens": torch.randint(sizes.codebook_size, shape, generator=generator),
        "token_mask": length_mask(torch.tensor(lengths)),
        "speaker": torch.randn(len(lengths), sizes.speaker_channels, generator=generator, dtype=torch.float64),
    }


@pytest.mark.parametrize("streaming", [False, True])
def test_condition_equals_the_published_one(streaming):
    """The longest utterance, and all of them once padding is left as the published code leaves it."""
    io = dump()
    vectors, mask = io["enc.token_emb"], length_mask(io["train.speech_token_len"])
    expected, real = io[f"enc.mu_stream{int(streaming)}"], io[f"enc.mask_stream{int(streaming)}"][:, 0].bool()
    assert torch.equal(mask.repeat_interleave(2, 1), real)
    assert off(published().condition(vectors, mask, streaming)[0], expected[0]) < TOLERANCE
    assert off(published(AsPublished).condition(vectors, mask, streaming)[real], expected[real]) < TOLERANCE


def test_token_and_speaker_vectors_equal_the_published_ones():
    io, flow = dump(), published()
    mask = length_mask(io["train.speech_token_len"])
    vectors = flow.embed(io["train.speech_token"]) * mask[..., None]
    assert off(vectors, io["enc.token_emb"]) < TOLERANCE
    assert off(flow.project_speaker(io["infer.embedding"]), io["infer.spks"]) < TOLERANCE


@pytest.mark.parametrize("name", ["trainA", "trainB"])
def test_velocity_in_training_equals_the_published_one(name):
    flow, (given, own) = published(), training(name)
    told = Given(own["est_mu"].transpose(1, 2), own["est_spks"], own["est_cond"].transpose(1, 2))
    mask = own["mask"][:, 0].bool()
    velocity = flow.velocity(own["y"].transpose(1, 2), own["est_t"], told, mask, given["draws"].streaming)
    assert off(velocity[mask], own["pred"].transpose(1, 2)[mask]) < TOLERANCE


@pytest.mark.parametrize("name", ["trainA", "trainB"])
def test_loss_of_the_published_condition_equals_the_published_loss(name):
    flow, (given, own) = published(), training(name)
    mean = own["mu"].transpose(1, 2)
    flow.condition = lambda vectors, mask, streaming=False, final=True, voice=None: mean
    assert off(flow.loss(**given).value, own["loss"]) < TOLERANCE


@pytest.mark.parametrize("name", ["trainA", "trainB"])
def test_loss_and_gradients_equal_the_published_ones_but_for_padding(name):
    """With padding as in the published code all is equal; without it the padded utterances differ a little."""
    given, own = training(name)
    as_published, ours = published(AsPublished), published()
    for flow in (as_published, ours):
        flow.loss(**given).value.backward()
    assert off(as_published.loss(**given).value, own["loss"]) < TOLERANCE
    assert off(as_published.input_embedding.weight.grad, own["grad.input_embedding"]) < TOLERANCE
    assert off(gradient_norm(as_published), own["grad_norm"]) < TOLERANCE

    assert 0 < off(ours.loss(**given).value, own["loss"]) < 1e-4
    assert off(gradient_norm(ours), own["grad_norm"]) < 1e-3
    assert off(ours.input_embedding.weight.grad, own["grad.input_embedding"]) < 0.05


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("final", [False, True])
def test_mel_equals_the_published_one(streaming, final):
    io, flow = dump(), published()
    prompt, mel = io["infer.prompt_token"], io["infer.prompt_feat"]
    recording = FlowPrompt(
        prompt, torch.ones_like(prompt, dtype=torch.bool), mel, torch.ones(mel.shape[:2], dtype=torch.bool)
    )
    mask = torch.ones_like(io["infer.token"], dtype=torch.bool)
    made = flow.sample(io["infer.token"], mask, io["infer.embedding"], recording, streaming=streaming, final=final)
    assert made.mask.all()
    assert off(made.mel.transpose(1, 2), io[f"infer.mel_stream{int(streaming)}_final{int(final)}"]) < TOLERANCE


def test_every_step_of_the_solver_equals_the_published_one():
    io, flow = dump(), published()
    tokens = torch.cat((io["infer.prompt_token"], io["infer.token"]), 1)
    mean = flow.condition(flow.embed(tokens), torch.ones_like(tokens, dtype=torch.bool))
    known = torch.zeros_like(mean)
    known[:, : io["infer.prompt_feat"].shape[1]] = io["infer.prompt_feat"]
    given = Given(mean, flow.project_speaker(io["infer.embedding"]), known)
    states, times, mask = io["infer.trace_x"].transpose(1, 2), io["infer.trace_t"], torch.ones(1, 46, dtype=torch.bool)
    field = flow.guided(given, mask, guidance=0.7, streaming=False)
    for now, then, t, next_t in zip(states[:-1], states[1:], times[:-1], times[1:], strict=True):
        assert off(now[None] + (next_t - t) * field(now[None], t[None]), then[None]) < TOLERANCE
    both = flow.velocity(states[:1].expand(2, -1, -1), times[:1].expand(2), given.with_nothing(), mask.expand(2, -1))
    assert off(both.transpose(1, 2), io["infer.trace_v0_cond_uncond"]) < TOLERANCE


def test_the_official_sizes_give_the_published_names_and_shapes():
    if not (FOLDER / "fullsize_keys.json").is_file():
        pytest.skip(f"the list of the published weights is not here ({FOLDER})")
    expected = json.loads((FOLDER / "fullsize_keys.json").read_text())["flow_v2"]
    with torch.device("meta"):
        flow = UNetFlow()
    state = flow.state_dict()
    assert {key: list(value.shape) for key, value in state.items()} == expected
    assert UNetFlowSizes.of(state) == UNetFlowSizes()
    assert sum(value.numel() for value in flow.parameters()) == 112_549_360
    assert sum(value.numel() for value in flow.encoder.parameters()) == 37_831_168
    assert sum(value.numel() for value in flow.decoder.parameters()) == 71_302_480


@pytest.mark.parametrize("sizes", OTHERS)
@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("final", [False, True])
def test_an_utterance_does_not_depend_on_its_neighbours(sizes, streaming, final):
    flow, lengths = make(sizes), [9, 4, 6]
    given = utterances(sizes, lengths)
    prompts, step = torch.tensor([0, 5, 2]), sizes.frames_per_token
    generator = torch.Generator().manual_seed(1)
    recording = FlowPrompt(
        torch.randint(sizes.codebook_size, (3, 5), generator=generator),
        length_mask(prompts, 5),
        torch.randn(3, 5 * step, sizes.mel_channels, generator=generator, dtype=torch.float64),
        length_mask(prompts * step, 5 * step),
    )
    together = flow.sample(**given, prompt=recording, steps=3, streaming=streaming, final=final)
    ahead = 0 if final else sizes.lookahead
    for item, length in enumerate(lengths):
        one, count = slice(item, item + 1), int(prompts[item])
        alone = flow.sample(
            given["tokens"][one, :length],
            given["token_mask"][one, :length],
            given["speaker"][one],
            FlowPrompt(
                recording.tokens[one, :count],
                recording.token_mask[one, :count],
                recording.mel[one, : count * step],
                recording.mel_mask[one, : count * step],
            ),
            steps=3,
            streaming=streaming,
            final=final,
        )
        frames = (length - ahead) * step
        assert int(together.mask[item].sum()) == alone.mel.shape[1] == frames
        torch.testing.assert_close(together.mel[item, :frames], alone.mel[0])


def test_the_loss_of_an_utterance_does_not_depend_on_its_neighbours():
    flow, lengths = make(), [8, 3, 5]
    given = utterances(SMALL, lengths)
    frames = [2 * length for length in lengths]
    generator = torch.Generator().manual_seed(2)
    mel = torch.randn(3, 16, 4, generator=generator, dtype=torch.float64)
    draws = FlowDraws.draw(frames, 4, [generator] * 3, streaming=False)
    draws = dataclasses.replace(
        draws, time=draws.time.double(), noise=draws.noise.double(), keep=torch.tensor([True, True, False])
    )
    together = flow.loss(**given, mel=mel, mel_mask=length_mask(torch.tensor(frames)), draws=draws)
    total = torch.zeros((), dtype=torch.float64)
    for item, length in enumerate(lengths):
        one, cut = slice(item, item + 1), slice(0, 2 * length)
        own = FlowDraws(draws.time[one], draws.noise[one, cut], draws.prompt[one], draws.keep[one])
        mask = torch.ones(1, length, dtype=torch.bool)
        alone = flow.loss(
            given["tokens"][one, :length],
            mask,
            mel[one, cut],
            mask.repeat_interleave(2, 1),
            given["speaker"][one],
            own,
        )
        total = total + alone.total
    torch.testing.assert_close(together.total, total)


@pytest.mark.parametrize("sizes", [SMALL, dataclasses.replace(SMALL, blocks=2, chunk_tokens=2, chunk_frames=4)])
def test_streamed_frames_do_not_change_when_more_is_said(sizes):
    flow = make(sizes)
    given = utterances(sizes, [11])
    whole = flow.sample(**given, steps=3, streaming=True).mel
    for said in range(sizes.chunk_tokens, 11 - sizes.lookahead, sizes.chunk_tokens):
        part = {key: value[:, : said + sizes.lookahead] for key, value in given.items() if key != "speaker"}
        made = flow.sample(**part, speaker=given["speaker"], steps=3, streaming=True, final=False).mel
        torch.testing.assert_close(made, whole[:, : 2 * said])


def test_soft_tokens_are_heard_and_learn():
    flow, given = make(), utterances(SMALL, [4, 3])
    draws = FlowDraws(
        torch.tensor([0.3, 0.6], dtype=torch.float64),
        torch.randn(2, 8, 4, dtype=torch.float64),
        torch.tensor([0, 2]),
        torch.tensor([True, True]),
    )
    mel, mask = torch.randn(2, 8, 4, dtype=torch.float64), length_mask(torch.tensor([8, 6]))
    soft = torch.nn.functional.one_hot(given["tokens"], SMALL.codebook_size).double().requires_grad_()
    loss = flow.loss(soft, given["token_mask"], mel, mask, given["speaker"], draws)
    hard = flow.loss(**given, mel=mel, mel_mask=mask, draws=draws)
    torch.testing.assert_close(loss.total, hard.total)
    loss.total.backward()
    assert (soft.grad[given["token_mask"]] != 0).all()
    assert not soft.grad[~given["token_mask"]].any()
    torch.testing.assert_close(flow.sample(**given).mel, flow.sample(**{**given, "tokens": soft}).mel)


def test_tokens_are_encoded_once_however_many_steps_there_are():
    flow, calls = make(), []
    flow.encoder.register_forward_hook(lambda *_: calls.append("encoder"))
    flow.decoder["estimator"].register_forward_hook(lambda *_: calls.append("unet"))
    flow.sample(**utterances(SMALL, [4, 3]), steps=5)
    assert calls == ["encoder"] + ["unet"] * 5


@pytest.mark.parametrize("sizes", OTHERS)
def test_sizes_are_read_from_weights_and_yaml(sizes):
    assert UNetFlowSizes.of(UNetFlow(sizes).state_dict(), yaml_of(sizes)) == sizes


def test_without_a_yaml_it_is_as_published():
    state = UNetFlow(dataclasses.replace(SMALL, unet_heads=2, unet_head_channels=64)).state_dict()
    sizes = UNetFlowSizes.of(state)
    assert (sizes.unet_heads, sizes.unet_head_channels) == (2, 64)
    assert (sizes.chunk_tokens, sizes.chunk_frames) == (25, 50)
    for config in ({}, {"flow": None}, {"flow": {"decoder": {}}}, {"encoder": {}}):
        with pytest.raises(ValueError, match="the model's yaml has no part flow"):
            UNetFlowSizes.of(state, config)


def test_what_a_part_of_the_yaml_leaves_out_is_as_published():
    state = UNetFlow(dataclasses.replace(SMALL, unet_heads=2, unet_head_channels=64)).state_dict()
    chunk = {"static_chunk_size": 6}
    for half in ({"num_heads": 4}, {"attention_head_dim": 32}):
        estimator = {"estimator": half | chunk}
        sizes = UNetFlowSizes.of(state, {"flow": {"encoder": chunk, "decoder": estimator}})
        assert (sizes.unet_heads, sizes.unet_head_channels) == (4, 32)
        assert (sizes.chunk_tokens, sizes.chunk_frames) == (6, 6)
    rates = {"dropout_rate": 0.2, "positional_dropout_rate": 0.3, "attention_dropout_rate": 0.4}
    estimator = {"estimator": {"dropout": 0.5} | chunk}
    sizes = UNetFlowSizes.of(state, {"flow": {"encoder": rates | chunk, "decoder": estimator}})
    drops = (sizes.dropout, sizes.position_dropout, sizes.attention_dropout, sizes.unet_dropout)
    assert drops == (0.2, 0.3, 0.4, 0.5)


def test_a_yaml_of_another_model_is_refused():
    config = yaml_of(dataclasses.replace(SMALL, unet_heads=5))
    with pytest.raises(ValueError, match=r"num_heads \* attention_head_dim = 6, .* got 5 \* 3"):
        UNetFlowSizes.of(UNetFlow(SMALL).state_dict(), config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 3}, "multiple of heads, got 8 and 3"),
        ({"chunk_frames": 0}, "chunk_frames must be positive, got 0"),
        ({"unet_dropout": 1.0}, r"unet_dropout must lie in \[0, 1\), got 1.0"),
    ],
)
def test_sizes_that_cannot_work_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **change)


@pytest.mark.parametrize("sizes", OTHERS)
def test_weights_are_loaded_as_they_are(sizes):
    flow = make(sizes)
    state = {key: value.half() for key, value in flow.state_dict().items()}
    again = load_flow("cosyvoice2", state, yaml_of(sizes))
    assert isinstance(again, UNetFlow)
    assert again.sizes == sizes
    assert all(torch.equal(value, state[key].float()) for key, value in again.state_dict().items())
    assert all(value.dtype == torch.float32 and value.requires_grad for value in again.parameters())
    assert again.eval().sample(**_single(utterances(sizes, [3]))).mel.isfinite().all()


def _single(given: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**given, "speaker": given["speaker"].float()}


def test_training_does_not_write_into_what_was_loaded():
    state = UNetFlow(SMALL).state_dict()
    before = {key: value.clone() for key, value in state.items()}
    flow = load_flow("cosyvoice2", state, yaml_of(SMALL))
    with torch.no_grad():
        for value in flow.parameters():
            value.add_(1)
    assert all(torch.equal(value, before[key]) for key, value in state.items())


def test_the_other_family_is_loaded_too():
    inside = {"dim": 16, "depth": 1, "heads": 3, "head_dim": 4, "position_groups": 4, "lookahead_channels": 7}
    sizes = DiTFlowSizes(codebook_size=5, mel_channels=6, frames_per_token=3, chunk_frames=9, dropout=0.25, **inside)
    made = DiTFlow(sizes)
    estimator = {"static_chunk_size": 9, "dropout": 0.25}
    config = {"flow": {"token_mel_ratio": 3, "decoder": {"estimator": estimator}}}
    flow = load_flow("cosyvoice3", made.state_dict(), config)
    assert isinstance(flow, DiTFlow)
    assert flow.sizes == sizes
    assert all(torch.equal(value, made.state_dict()[key]) for key, value in flow.state_dict().items())
    assert not any(value.is_meta for value in (*flow.parameters(), *flow.buffers()))
    with pytest.raises(ValueError, match="U-Net"):
        load_flow("cosyvoice2", made.state_dict(), config)


def test_weights_that_do_not_fit_are_named():
    state = UNetFlow(SMALL).state_dict()
    part = {key: value for key, value in state.items() if key != "encoder.after_norm.bias"}
    with pytest.raises(ValueError, match=r"cosyvoice2 flow; missing: encoder\.after_norm\.bias$"):
        load_flow("cosyvoice2", part, yaml_of(SMALL))
    more = {**state, **{f"discriminator.{i}": torch.zeros(1) for i in range(7)}}
    with pytest.raises(ValueError, match=r"unexpected: discriminator\.0, .*discriminator\.4 and 2 more$"):
        load_flow("cosyvoice2", more, yaml_of(SMALL))
    odd = {**state, "encoder.after_norm.bias": torch.zeros(3)}
    with pytest.raises(ValueError, match=r"of other shapes: encoder\.after_norm\.bias$"):
        load_flow("cosyvoice2", odd, yaml_of(SMALL))
    with pytest.raises(ValueError, match=r"not the weights of a U-Net flow: no input_embedding\.weight"):
        load_flow("cosyvoice2", {})
