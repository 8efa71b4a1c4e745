"""Videos with sound, on a tiny LTX-2: what passes between the stages, and the resulting file."""

import io
from dataclasses import replace

import av
import numpy as np
import pytest
import torch

from deployments.answers import DecodeArguments, num_bytes
from deployments.checkpoints.source import fetch_checkpoint
from deployments.config.encoder import EncoderConfig
from deployments.config.vae import VaeConfig
from deployments.errors import NonFinite, WrongField
from deployments.memory.stored import stored_bytes
from deployments.request import GenerationRequest
from deployments.stages import load_stage
from deployments.stages.decode import Decoding
from deployments.stages.encode import TextEncoding
from deployments.stages.pipeline import loaded_models
from deployments.stages.tensors import each_tensor
from deployments.stages.trials.memory_estimate import DecodeMemoryEstimator
from deployments.stages.warm_up import tried_size
from tests.deployments.stages.test_staged_pipelines import model, small_request
from tests.deployments.variants import denoise, denoise_staged, load_denoising

Decoded = tuple[Decoding, DecodeArguments]


@pytest.fixture(scope="module")
def request_() -> GenerationRequest:
    return replace(small_request("ltx2", "generate"), output_format="mp4")


@pytest.fixture(scope="module")
def decoded(request_: GenerationRequest) -> Decoded:
    """Returns the decode stage and what it is to decode."""
    return denoise_staged(model("ltx2"), request_)


@pytest.fixture(scope="module")
def encoding() -> TextEncoding:
    return load_stage("encode", model("ltx2"), EncoderConfig())


def test_the_file_sounds_as_the_stage_made_it(decoded: Decoded, request_: GenerationRequest) -> None:
    stage, arguments = decoded
    assert arguments.sound is not None
    data, media_type = stage.decode_media(arguments, request_)
    assert media_type == "video/mp4"
    with av.open(io.BytesIO(data)) as container:
        heard = np.concatenate([frame.to_ndarray() for frame in container.decode(audio=0)], axis=1)
        rate = container.streams.audio[0].rate
    sound = stage.decode_sound(arguments.sound)
    assert rate == sound.rate
    num_samples = sound.samples.shape[1]
    assert np.abs(heard[:, :num_samples] - sound.samples).mean() < 0.1 * np.abs(sound.samples).mean()


def test_sound_that_is_no_number_is_refused(request_: GenerationRequest, decoded: Decoded) -> None:
    stage, arguments = decoded
    broken = torch.full_like(arguments.sound.latents, float("nan"))
    with pytest.raises(NonFinite, match=r"the sound that LTX2Vocoder made is NaN or infinite: vae\.dtype"):
        stage.decode_media(replace(arguments, sound=DecodeArguments.of(broken)), request_)


@pytest.mark.filterwarnings("ignore:std")  # guidance takes the std of the empty sound
def test_a_video_too_short_for_sound_is_the_requests_fault(
    request_: GenerationRequest, encoding: TextEncoding
) -> None:
    short = replace(request_, num_frames=1, fps=120)
    stage = load_denoising(model("ltx2"))
    try:
        with pytest.raises(WrongField, match="too short for sound") as refused:
            denoise(stage, encoding.encode(short), short)
    finally:
        stage.close()
    assert refused.value.param == "num_frames"


def test_what_makes_sound_counts_among_the_weights(decoded: Decoded) -> None:
    stage, _ = decoded
    models = loaded_models(stage._pipe)
    assert models.keys() == {"vae", "audio_vae", "vocoder"}
    classes = {name: type(one) for name, one in models.items()}
    of = model("ltx2")
    estimate = DecodeMemoryEstimator(classes, fetch_checkpoint("tiny://ltx2", ()), VaeConfig(), of.geometry)
    assert estimate(tried_size(of.geometry))[0] == sum(map(stored_bytes, models.values()))


def test_progress_counts_the_steps_of_the_video_alone(request_: GenerationRequest, encoding: TextEncoding) -> None:
    """The sound has a copy of the scheduler, whose steps do not count."""
    encodings, steps = encoding.encode(request_), list[int]()
    stage = load_denoising(model("ltx2"))
    seat = stage.join()
    try:
        stage.denoise(seat, encodings, request_, lambda step, _latents: steps.append(step))
    finally:
        stage.leave(seat)
        stage.close()
    assert steps == list(range(1, request_.num_inference_steps + 1))


def test_hidden_states_that_connectors_alone_read_do_not_travel(
    request_: GenerationRequest, encoding: TextEncoding
) -> None:
    """The hidden states of all layers take 0.4 GiB for 1024 tokens; other stages need only their shapes."""
    encodings = dict(encoding.encode(request_))
    assert list(encodings) == ["encode_prompt", "connectors"]
    assert not any(one.is_floating_point() for one in each_tensor(encodings["encode_prompt"]))
    assert [one.is_floating_point() for one in each_tensor(encodings["connectors"])] == [True, True, False]


def test_a_repeated_prompt_costs_no_forward_of_the_encoder_nor_of_the_connectors(
    request_: GenerationRequest, encoding: TextEncoding
) -> None:
    first = encoding.encode(request_)
    before = encoding.num_forwards
    assert encoding.recall(request_) is not None
    again = encoding.encode(replace(request_, seed=request_.seed + 1))
    assert encoding.num_forwards == before
    assert dict(again)["connectors"][0] is dict(first)["connectors"][0]


def test_what_connectors_made_is_made_anew_where_it_is_no_longer_kept(
    request_: GenerationRequest, encoding: TextEncoding
) -> None:
    first, cache = encoding.encode(request_), encoding.cache
    for key, (value, size) in list(cache._entries.items()):
        if size == num_bytes(dict(first)["connectors"]):
            del cache._entries[key]
            cache.num_bytes -= size
            assert value[0] is dict(first)["connectors"]
    assert encoding.recall(request_) is None
    again = dict(encoding.encode(request_))["connectors"]
    assert all(torch.equal(one, other) for one, other in zip(again, dict(first)["connectors"], strict=True))
