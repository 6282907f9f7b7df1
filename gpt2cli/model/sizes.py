"""A model's sizes, as in its hparams.json."""

import json
from dataclasses import dataclass, field
from typing import Any

from gpt2cli import counts, files
from gpt2cli.errors import UserError

# The released sizes. 117M and 345M were their names before OpenAI counted the weights again.
ALIASES = {"117M": "124M", "345M": "355M"}
RELEASED = ("124M", "355M", "774M", "1558M")  # openai/gpt-2 DEVELOPERS.md

SIZES = ("n_vocab", "n_ctx", "n_embd", "n_head", "n_layer")  # openai/gpt-2 src/model.py

# n_layer, n_head, n_embd. The released sizes are from OpenAI's hparams.json. distil has half the
# layers of 124M, as Hugging Face's distilgpt2 and UER-py models/gpt2/distil_config.json.
PRESETS = {
    "tiny": (4, 5, 160),
    "distil": (6, 12, 768),
    "124M": (12, 12, 768),
    "355M": (24, 16, 1024),
    "774M": (36, 20, 1280),
    "1558M": (48, 25, 1600),
}

LARGEST = {"n_layer": 10_000}  # each layer adds names to a list; no GPT-2 has even 100
# The functions between the two matrices of an MLP, by transformers' names. gelu_new, the tanh form,
# is OpenAI's; gelu is the exact form. transformers' GPT2Config documents these five.
ACTIVATIONS = ("gelu_new", "gelu", "relu", "silu", "tanh")
# A key of transformers' config.json -> ours. In hparams.json, theirs would have no effect.
THEIR_KEYS = {"activation_function": "activation", "layer_norm_epsilon": "ln_epsilon"}
LN_EPSILON = 1e-5  # openai/gpt-2 src/model.py, norm; the same in GPT2_ML train/utils.py


@dataclass(frozen=True)
class ModelConfig:
    """A model's sizes, and its other settings in hparams.json.

    Args:
        n_vocab: rows of the token embedding.
        n_ctx: positions the model can see.
        n_embd: width of the residual stream.
        n_head: attention heads in a layer; divides n_embd.
        n_layer: layers.
        arch: order of operations in a layer and names of the weights: gpt2, or gpt2_ml
            (imcaspar/gpt2-ml, Chinese, 1.5B).
        ln_epsilon: number added to the variance in layer norms.
        activation: function inside the MLPs, one of ACTIVATIONS; GPT2_ML's is always gelu.
        n_inner: width inside the MLPs; None for 4 n_embd.
        extra: other keys of the file, kept when it is written again: lower_case, start_token and
            end_token for the encoder, and unknown keys.

    Raises:
        UserError: a value has the wrong type or is outside its limits.
    """

    n_vocab: int
    n_ctx: int
    n_embd: int
    n_head: int
    n_layer: int
    arch: str = "gpt2"
    ln_epsilon: float = LN_EPSILON
    activation: str = ACTIVATIONS[0]
    n_inner: int | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in (*SIZES, *(["n_inner"] if self.n_inner is not None else [])):
            value, most = getattr(self, name), LARGEST.get(name, counts.MAX_COUNT)
            if not counts.is_whole(value, 1, most):
                raise UserError(
                    f"hparams: {name} must be a whole number from 1 to {most}, got {value!r:.50}"
                )
        if self.n_embd % self.n_head:
            raise UserError(
                f"hparams: n_embd {self.n_embd} is not a multiple of n_head {self.n_head}"
            )
        if self.arch not in ("gpt2", "gpt2_ml"):
            raise UserError(f"hparams: arch must be gpt2 or gpt2_ml, got {self.arch!r:.50}")
        if type(self.ln_epsilon) is not float or not 0 <= self.ln_epsilon < 1:
            raise UserError(
                f"hparams: ln_epsilon must be a number from 0 to 1, got {self.ln_epsilon!r:.50}"
            )
        if self.activation not in ACTIVATIONS:
            raise UserError(
                f"hparams: activation must be one of {', '.join(ACTIVATIONS)}, "
                f"got {self.activation!r:.50}"
            )
        if self.arch == "gpt2_ml" and self.activation != ACTIVATIONS[0]:
            raise UserError("hparams: leave out activation with arch gpt2_ml, which has its own")

    @property
    def inner_width(self) -> int:
        """The width inside the MLPs."""
        return self.n_inner or 4 * self.n_embd

    @classmethod
    def from_json(cls, text: str | bytes, where: str = "hparams.json") -> "ModelConfig":
        """Parse hparams.json or GPT2_ML's config.json.

        Args:
            text: the content of the file.
            where: its name, for errors.

        Raises:
            UserError: it is neither.
        """
        values = files.parse_object(text, where)
        if "num_hidden_layers" in values and "n_layer" not in values:
            values = _from_gpt2_ml(values, where)
        missing = [name for name in SIZES if name not in values]
        if missing:
            raise UserError(f"{where} lacks {', '.join(missing)}")
        for theirs, ours in THEIR_KEYS.items():
            if theirs in values:
                raise UserError(f"{where}: {theirs} is transformers' name; write {ours} instead")
        known = {name: values.pop(name) for name in (*SIZES, *OPTIONAL) if name in values}
        if type(known.get("ln_epsilon")) is int and known["ln_epsilon"] == 0:
            known["ln_epsilon"] = 0.0  # any other whole number is too large
        try:
            config = cls(**known, extra=values)
            config.to_json().encode()
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        except UnicodeEncodeError as error:  # no UTF-8 file can have it
            half = ascii(error.object[error.start])
            raise UserError(f"{where} has a lone surrogate, {half}. Remove it") from None
        return config

    def to_json(self) -> str:
        """Return the text of hparams.json: sizes, differences from OpenAI's models, other keys."""
        values = {name: getattr(self, name) for name in SIZES}
        for name in OPTIONAL:
            if getattr(self, name) != getattr(type(self), name):
                values[name] = getattr(self, name)
        values |= self.extra
        return json.dumps(values, indent=2, ensure_ascii=False) + "\n"


OPTIONAL = ("arch", "ln_epsilon", "activation", "n_inner")

# names in hparams.json -> names in imcaspar/gpt2-ml configs/*.json
GPT2_ML_NAMES = {
    "n_vocab": "vocab_size",
    "n_ctx": "max_position_embeddings",
    "n_embd": "hidden_size",
    "n_head": "num_attention_heads",
    "n_layer": "num_hidden_layers",
}


def _from_gpt2_ml(values: dict[str, Any], where: str) -> dict[str, Any]:
    """Convert GPT2_ML's config JSON to the values of hparams.json; UserError if it is not one."""
    missing = [name for name in GPT2_ML_NAMES.values() if name not in values]
    if missing:
        raise UserError(f"{where} lacks {', '.join(missing)}: it is not a config of GPT2_ML")
    sizes = {ours: values[theirs] for ours, theirs in GPT2_ML_NAMES.items()}
    inner, width = values.get("intermediate_size"), values["hidden_size"]
    is_usual = type(width) is int and inner == 4 * width
    return {**sizes, "arch": "gpt2_ml", "n_inner": None if is_usual else inner}
