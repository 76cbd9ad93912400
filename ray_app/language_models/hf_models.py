"""Live models that answer questions about clips, greedily, with the time of each stage: Hugging Face transformers.

Weights are safetensors in a local folder; no code from the folder is run and nothing is fetched.
Shapes: T = tokens of an answer, D = width of a model's last hidden state.
"""

import json
import time
from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import torch
from torch import Tensor

from ray_app.errors import InputError, ResourceError
from ray_app.sources.clips import Clip

EXTRA = "pip install 'ray-app[capture]'"
SAFE = {"local_files_only": True, "trust_remote_code": False}
WARM_UP_TOKENS = 4


@dataclass(frozen=True, slots=True)
class ModelAnswer:
    """One model's answer to one question about one clip."""

    tokens: list[int]
    """With the end token, where the model came to it."""
    text: str
    """The same without special tokens."""
    prefill_ms: float
    """From the prompt to the first token, pictures included."""
    step_ms: float | None
    """Mean time of each later token; None where there is one token only."""
    verify_ms: dict[int, float]
    """A pass over so many drafted tokens behind the last accepted one, by γ."""
    num_verified: int
    """Tokens that these passes chose once more..."""
    num_verified_otherwise: int
    """...and how many of them came out otherwise than step by step: rounding, where it is not 0."""
    states_TD: Tensor | None
    """Last hidden state before the head for each token's choice, bfloat16, on the CPU."""


class LiveModel:
    """A model with its tokenizer on one device. A subclass says how it is loaded and what it is shown."""

    shows: ClassVar[str]
    """Description of the model's input, for the manifest."""

    def __init__(self, folder: Path, dtype: str, device: str) -> None:
        self._hf = transformers()
        self.tokenizer = read_tokenizer(folder)
        self.model, loaded = self.model_class().from_pretrained(
            folder, dtype=dtype, use_safetensors=True, output_loading_info=True, **SAFE
        )
        if absent := sorted(loaded["missing_keys"]) + sorted(str(key) for key in loaded["mismatched_keys"]):
            raise InputError(  # the library would make them up
                f"{folder}: {len(absent)} weights of a {type(self.model).__name__} are missing or of another shape, "
                f"{absent[0]} is the first; take the folder that the model was saved to."
            )
        self.model = self.model.to(device).eval()
        self.device = torch.device(device)
        # What a checkpoint brings along (sampling, penalties) would not be greedy decoding.
        self.model.generation_config = self._hf.GenerationConfig(
            bos_token_id=self.tokenizer.bos_token_id,
            eos_token_id=self.tokenizer.eos_token_id,
            pad_token_id=self.tokenizer.eos_token_id,
        )

    @abstractmethod
    def model_class(self) -> Any:
        """Return the class of transformers that loads it."""

    @abstractmethod
    def inputs(self, clip: Clip, question: str) -> dict[str, Tensor]:
        """Arguments of `generate`, on the CPU."""

    @torch.inference_mode()
    def answer(
        self, clip: Clip, question: str, *, max_new_tokens: int, verify: tuple[int, ...] = (), with_states: bool
    ) -> ModelAnswer:
        """Decode greedily, a token at a time. Preparing the inputs on the CPU is in no time."""
        inputs = {
            name: value.to(self.device, self.model.dtype) if value.is_floating_point() else value.to(self.device)
            for name, value in self.inputs(clip, question).items()
        }
        stamps: list[float] = []
        with self._last_states() as states:
            made = self.model.generate(
                **inputs,
                do_sample=False,
                max_new_tokens=max_new_tokens,
                return_dict_in_generate=True,
                streamer=_Stamps(stamps, self._now),
            )
        tokens = made.sequences[0, inputs["input_ids"].shape[1] :].tolist()
        assert len(stamps) == len(tokens) + 1, "generate puts the prompt, then each token"
        passes = [self._verify(made.cache, tokens, gamma) for gamma in verify if gamma + 1 < len(tokens)]
        return ModelAnswer(
            tokens=tokens,
            text=self.tokenizer.decode(tokens, skip_special_tokens=True).strip(),
            prefill_ms=1e3 * (stamps[1] - stamps[0]),
            step_ms=1e3 * (stamps[-1] - stamps[1]) / (len(tokens) - 1) if len(tokens) > 1 else None,
            verify_ms={gamma: ms for gamma, ms, _ in passes},
            num_verified=sum(gamma + 1 for gamma, _, _ in passes),
            num_verified_otherwise=sum(otherwise for _, _, otherwise in passes),
            states_TD=torch.stack(states).to("cpu", torch.bfloat16) if with_states else None,
        )

    def warm_up(self, clip: Clip, question: str, verify: tuple[int, ...]) -> None:
        """Return the first answer of a process is slow: kernels are chosen, memory is claimed."""
        self.answer(
            clip, question, max_new_tokens=max((*verify, WARM_UP_TOKENS)) + 2, verify=verify, with_states=False
        )

    def _verify(self, cache: Any, tokens: list[int], gamma: int) -> tuple[int, float, int]:
        """(γ, milliseconds, tokens chosen otherwise) of one pass over the last accepted and γ drafted tokens.

        The answer's own end serves as draft; the cache is as long afterwards as before.
        """
        size = gamma + 1
        fed = torch.tensor([tokens[-size - 1 : -1]], device=self.device)
        cache.crop(-size)
        began = self._now()
        logits = self.model(input_ids=fed, cache=cache, use_cache=True).logits
        chosen = logits[0].argmax(dim=-1).tolist()
        ms = 1e3 * (self._now() - began)
        return gamma, ms, sum(a != b for a, b in zip(chosen, tokens[-size:], strict=True))

    @contextmanager
    def _last_states(self) -> Iterator[list[Tensor]]:
        """Collect the head's input for each token's choice."""
        states: list[Tensor] = []

        def keep(_: Any, arguments: tuple[Tensor]) -> None:
            states.append(arguments[0][0, -1].clone())

        hook = self.model.get_output_embeddings().register_forward_pre_hook(keep)
        try:
            yield states
        finally:
            hook.remove()

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


class VideoLlava(LiveModel):
    """Video-LLaVA: the frames through the checkpoint's own image processor, the prompt as it was trained."""

    shows = "frames"

    def __init__(self, folder: Path, dtype: str, device: str) -> None:
        super().__init__(folder, dtype, device)
        config = self.model.config
        pictures = self._hf.VideoLlavaImageProcessor.from_pretrained(folder, local_files_only=True)
        self._processor = _video_llava_processor(self._hf)(
            image_processor=pictures,
            video_processor=pictures,
            tokenizer=self.tokenizer,
            patch_size=config.vision_config.patch_size,
            vision_feature_select_strategy=config.vision_feature_select_strategy,
            image_token=self.tokenizer.convert_ids_to_tokens(config.image_token_index),
            video_token=self.tokenizer.convert_ids_to_tokens(config.video_token_index),
        )

    def model_class(self) -> Any:
        return self._hf.VideoLlavaForConditionalGeneration

    def inputs(self, clip: Clip, question: str) -> dict[str, Tensor]:
        prompt = f"USER: {self._processor.video_token}\n{question} ASSISTANT:"
        return dict(self._processor(text=prompt, videos=clip.frames_THWC, return_tensors="pt"))


class TextModel(LiveModel):
    """A language model that sees the question alone: the worth of a drafter without eyes."""

    shows = "the question alone"

    def model_class(self) -> Any:
        return self._hf.AutoModelForCausalLM

    def inputs(self, clip: Clip, question: str) -> dict[str, Tensor]:  # noqa: ARG002
        if self.tokenizer.chat_template:
            chat = [{"role": "user", "content": question}]
            asked = self.tokenizer.apply_chat_template(
                chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        else:
            asked = self.tokenizer(f"USER: {question} ASSISTANT:", return_tensors="pt")
        return {name: asked[name] for name in ("input_ids", "attention_mask")}


LOADERS: dict[str, type[LiveModel] | None] = {"video_llava": VideoLlava, "EventChat_llama": None}
"""Loaders by `model_type` of config.json; every other model is a `TextModel`. EventGPT has none: its classes are not
part of transformers, and code from a checkpoint is never run."""


def loader(folder: Path) -> type[LiveModel]:
    """Return the loader of a folder's model. InputError: no model, no loader, weights not in safetensors."""
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{folder} is no folder of a Hugging Face model: config.json cannot be read.") from error
    if not any(folder.glob("*.safetensors")):
        raise InputError(
            f"{folder} has no weights in safetensors. Pickled ones (pytorch_model.bin) are not read: convert them "
            "with save_pretrained(..., safe_serialization=True)."
        )
    kind = LOADERS.get(config.get("model_type", ""), TextModel)
    if kind is None:
        raise InputError(
            f"{folder} is EventGPT, which has no loader here yet. Name another --drafter, or bring EventGPT's "
            "recorded outputs as traces."
        )
    return kind


def load(folder: Path, dtype: str, device: str) -> LiveModel:
    """Return the model in a folder. InputError: it cannot be read as what its config.json says."""
    kind = loader(folder)
    try:
        return kind(folder, dtype, device)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise InputError(f"{folder} cannot be loaded as {kind.__name__}: {str(error).splitlines()[0]}") from error


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Facts about the target's tokens that `replay` needs."""

    size: int
    """Numbers that the model may choose."""
    start_token: int | None
    """Token before a text, where the tokenizer has one."""
    end_token: int
    """Ends an answer."""


def vocabulary(folder: Path) -> Vocabulary:
    """Read the facts of the model in a folder. InputError: no tokenizer, or one without an end token."""
    hf = transformers()
    try:
        config, tokenizer = hf.AutoConfig.from_pretrained(folder, **SAFE), read_tokenizer(folder)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{folder}: its config or tokenizer cannot be read: {str(error).splitlines()[0]}") from error
    return Vocabulary(config.get_text_config().vocab_size, tokenizer.bos_token_id, tokenizer.eos_token_id)


def read_tokenizer(folder: Path) -> Any:
    """InputError: it has no end token."""
    tokenizer = transformers().AutoTokenizer.from_pretrained(folder, **SAFE)
    if tokenizer.eos_token_id is None:
        raise InputError(f"{folder}: its tokenizer has no end token, so no answer would ever be whole.")
    return tokenizer


def same_tokens(one: Any, other: Any) -> bool:
    """Return True if two tokenizers give one meaning to every id that both have, added tokens apart."""
    mine, theirs = one.get_vocab(), other.get_vocab()
    added = one.get_added_vocab().keys() | other.get_added_vocab().keys()
    small, large = sorted((mine, theirs), key=len)
    return all(large.get(token) == number for token, number in small.items() if token not in added)


def transformers() -> ModuleType:
    """Return the library, which only `capture` needs. ResourceError: it is not installed."""
    try:
        import transformers as library
    except ImportError as error:
        raise ResourceError(f"capture needs the library transformers, which is not installed: {EXTRA}") from error
    library.utils.logging.set_verbosity_error()
    library.utils.logging.disable_progress_bar()
    return library


class _Stamps:
    """A streamer of `generate` that notes when each token came."""

    def __init__(self, stamps: list[float], now: Callable[[], float]) -> None:
        self._stamps, self._now = stamps, now

    def put(self, _: Tensor) -> None:
        self._stamps.append(self._now())

    def end(self) -> None:
        pass


def _video_llava_processor(hf: ModuleType) -> Any:
    """Return a VideoLlavaProcessor that needs no torchvision, as its class for videos does.

    Frames go one by one through the checkpoint's image processor, which takes the same steps with Pillow and numpy.
    """

    class Processor(hf.VideoLlavaProcessor):  # type: ignore[name-defined]
        def check_argument_for_proper_class(self, _: str, argument: Any) -> type:
            return type(argument)  # the check itself fails without torchvision

        def _process_videos(self, videos: Any, **_: Any) -> tuple[dict[str, Tensor], list[str]]:
            pixels_TCHW = self.image_processor(
                list(videos), return_tensors="pt", return_legacy_image_output=False, input_data_format="channels_last"
            )["pixel_values"]
            pixels = {"pixel_values_videos": pixels_TCHW.unsqueeze(0)}
            return pixels, [self.replace_video_token(pixels, video_idx=0)]

    return Processor
