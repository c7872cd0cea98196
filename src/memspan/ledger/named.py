"""A model from a few words: a file of the user's, a configuration, or a name that transformers or timm knows.

Nothing is fetched: weights are drawn when the model is built (on fake tensors, not at all), and
configurations come from the packages themselves, a local folder or file, or the local cache of the hub.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from memspan.base import nearest, optional, refuse
from memspan.base.mismatch import broken_torchvision_hidden
from memspan.ledger.factory import Factory, load_factory
from memspan.ledger.shapes import SHAPES, Llama

__all__ = ["load_model"]

_TOKENS = 512
_USAGE = (
    "give path/to/file.py:function; a shape that is built in (llama-7b); a config.json or a folder with one; "
    "a model type or configuration of transformers (llama, BertConfig), or a model of timm (resnet50)"
)


def load_model(
    where: str, *, batch: int = 8, tokens: int | None = None, classes: int | None = None
) -> Factory:
    """A model's builder with an example batch and its loss.

    Args:
        where: one of

            - ``path/to/file.py:function`` (see :func:`~memspan.ledger.load_factory`; sizes are its own);
            - a shape that is built in (``llama-7b``, ``llama-13b``): no library is needed;
            - a ``config.json`` of transformers, or a folder with one;
            - a model type (``llama``), configuration (``LlamaConfig``) or model class
              (``LlamaForCausalLM``) of transformers, at the sizes it has by default;
            - a name on the hub whose configuration is in the local cache;
            - a model of timm, by name.
        batch: examples in the batch.
        tokens: length of a sequence, for models of text; None: 512, or the model's longest.
        classes: that a labelling model tells apart; None: as its configuration says.

    Raises:
        BadInput: nothing of that name, a kind of model that has no batch here, or more tokens than it takes.

    Example:
        >>> load_model("nothing-like-this")
        Traceback (most recent call last):
        memspan.base.refusal.BadInput: model='nothing-like-this': give path/to/file.py:function; ...
    """
    for name, number in (("batch", batch), ("tokens", tokens or 1), ("classes", classes or 1)):
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            refuse(name, number, "give a whole number, 1 or more")
    if ".py:" in where or Path(where).suffix == ".py":
        return load_factory(where)
    if where in SHAPES:
        shape = SHAPES[where]
        length = tokens or _TOKENS
        if length > shape.longest:
            refuse("tokens", length, f"{where} takes at most {shape.longest}")
        ids = {"input_ids": _numbers(batch, length), "labels": _numbers(batch, length)}
        return Factory(functools.partial(Llama, shape), ids, None, shape.longest)
    with contextlib.ExitStack() as hidden:
        broken = ""
        with contextlib.suppress(ImportError, RuntimeError):
            broken = hidden.enter_context(broken_torchvision_hidden(optional("transformers", extra="minilm")))
        return _of_name(where, batch, tokens, classes, broken)


def _of_name(where: str, batch: int, tokens: int | None, classes: int | None, broken: str) -> Factory:
    path = Path(where)
    if path.is_dir():
        path = path / "config.json"
        if not path.is_file():
            refuse("model", where, "this folder holds no config.json")
    if path.suffix == ".json":
        return _of_config(_read_config(path, where), where, batch, tokens, classes)
    config, failed = _named_config(where)
    if config is not None:
        return _of_config(config, where, batch, tokens, classes)
    timm, missing = _timm()
    name = where.removeprefix("hf-hub:").removeprefix("hf_hub:").removeprefix("timm/")
    if timm is not None and timm.is_model(name):
        return _of_timm(timm, name, batch, classes)
    unknown = "" if timm is not None else f"; names of timm are not known here: {broken or missing}"
    names = [] if timm is None else timm.list_models()
    meant = "/" not in where and difflib.get_close_matches(name, names, cutoff=0.85)
    theirs = where.startswith(("timm/", "hf-hub:timm/", "hf_hub:timm/"))
    if not theirs and not meant and (kind := _kind_in(name)):
        told = "its configuration is not on this machine, and nothing is fetched"
        remedy = f"{told}; give its config.json, or plan {kind}, which has that architecture's usual sizes"
        refuse("model", where, remedy + unknown)
    if timm is None:
        refuse("model", where, _USAGE + unknown)
    refuse("model", where, f"{_USAGE}; {nearest(name, names)}{f' ({failed})' if failed else ''}")


def _kind_in(name: str) -> str:
    """The model type of transformers that a name on the hub speaks of: the longest, or ""."""
    try:
        known = optional("transformers", extra="minilm").CONFIG_MAPPING
    except (ImportError, RuntimeError):
        return ""
    for part in (name.rpartition("/")[2], name):
        joined = re.sub(r"[^a-z0-9]", "", part.lower())
        fits = [kind for kind in known if len(kind) > 2 and re.sub("[-_.]", "", kind) in joined]
        if fits:
            return str(max(fits, key=len))
    return ""


def _read_config(path: Path, where: str) -> Any:
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        refuse("model", where, f"no configuration can be read there ({error})")
    if not isinstance(content, Mapping) or "model_type" not in content:
        refuse("model", where, 'a configuration of transformers names its "model_type"')
    transformers = optional("transformers", extra="minilm")
    kind = content["model_type"]
    if kind not in transformers.CONFIG_MAPPING:
        refuse("model_type", kind, nearest(str(kind), list(transformers.CONFIG_MAPPING)))
    return transformers.CONFIG_MAPPING[kind].from_dict(dict(content))


def _named_config(where: str) -> tuple[Any, str]:
    """A configuration by model type, class name, or the hub's local cache; else why there is none."""
    try:
        transformers = optional("transformers", extra="minilm")
    except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision built for another torch
        return None, str(error).splitlines()[0]
    try:
        if where in transformers.CONFIG_MAPPING:
            return transformers.CONFIG_MAPPING[where](), ""
        kind = getattr(transformers, where, None) if where.isidentifier() else None
        if isinstance(kind, type) and issubclass(kind, transformers.PretrainedConfig):
            return kind(), ""
        if isinstance(kind, type) and getattr(kind, "config_class", None) is not None:
            config = getattr(kind, "config_class")()  # noqa: B009
            config.architectures = [where]
            return config, ""
        if "/" in where:
            return transformers.AutoConfig.from_pretrained(where, local_files_only=True), ""
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        return None, str(error).splitlines()[0]
    return None, ""


def _of_config(config: Any, where: str, batch: int, tokens: int | None, classes: int | None) -> Factory:
    if classes is not None:
        config.num_labels = classes
    kind, build = _class_for(config, where)
    if kind == "image":
        side = getattr(config, "image_size", 224)
        height, width = (side, side) if isinstance(side, int) else side
        pixels = torch.empty(batch, getattr(config, "num_channels", 3), height, width, device="meta")
        return Factory(build, {"pixel_values": pixels, "labels": _numbers(batch)})
    longest = getattr(config, "max_position_embeddings", None)
    if not isinstance(longest, int) or longest < 1:
        longest = None
    length = tokens or min(_TOKENS, longest or _TOKENS)
    if longest is not None and length > longest:
        refuse("tokens", length, f"{where} takes at most {longest}")
    ids = _numbers(batch, length)
    labels = _numbers(batch) if kind == "class" else _numbers(batch, length)
    return Factory(build, {"input_ids": ids, "labels": labels}, None, longest)


def _class_for(config: Any, where: str) -> tuple[str, Callable[[], nn.Module]]:
    """What the model learns by (class, text, image), and how it is built.

    As its configuration says; else decoders continue text, and encoders label it.
    """
    transformers = optional("transformers", extra="minilm")
    quantized = getattr(config, "quantization_config", None)
    if quantized is not None:
        made = quantized if isinstance(quantized, Mapping) else vars(quantized)
        remedy = "weights packed by another library are planned from a file.py:function that builds the model"
        more = "; take it out to plan the floats, with --method peqa for integers under trained scales"
        refuse("quantization_config", str(made.get("quant_method", "there")), remedy + more)
    tables = transformers.models.auto.modeling_auto
    if getattr(config, "decoder_start_token_id", None) is None and getattr(
        config, "is_encoder_decoder", False
    ):
        config.decoder_start_token_id = getattr(config, "pad_token_id", None) or 0
    config.use_cache = False  # a cache of keys and values is of no use in training
    named = [name for name in (config.architectures or ()) if hasattr(transformers, name)]
    kinds = (("SEQUENCE_CLASSIFICATION", "class"), ("IMAGE_CLASSIFICATION", "image"), ("CAUSAL_LM", "text"))
    every = {kind: getattr(tables, f"MODEL_FOR_{task}_MAPPING_NAMES") for task, kind in kinds}
    every["text "] = tables.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    every["text  "] = tables.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES
    for kind, table in every.items():
        for name in named:
            if name in table.values():
                return kind.strip(), functools.partial(_built, getattr(transformers, name), config)
    model_type = config.model_type
    encoder = model_type in tables.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    order = ("class", "image") if encoder else ("text", "text  ", "image", "class")
    for kind in order:
        if model_type in every[kind]:
            chosen = getattr(transformers, every[kind][model_type])
            return kind.strip(), functools.partial(_built, chosen, config)
    refuse(
        "model",
        where,
        f"models of type {model_type} neither label nor continue; write a file.py:function with their batch",
    )


def _built(kind: Any, config: Any) -> nn.Module:
    """In the dtype that the configuration names, as its checkpoint is loaded."""
    named = getattr(config, "dtype", None)
    dtype = getattr(torch, named.removeprefix("torch."), None) if isinstance(named, str) else named
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype if isinstance(dtype, torch.dtype) else before)
    try:
        model: nn.Module = kind(config)
        return model
    finally:
        torch.set_default_dtype(before)


def _of_timm(timm: Any, name: str, batch: int, classes: int | None) -> Factory:
    more = {} if classes is None else {"num_classes": classes}
    build = functools.partial(timm.create_model, name, pretrained=False, **more)
    with torch.device("meta"):
        channels, height, width = build().default_cfg.get("input_size", (3, 224, 224))
    images = torch.empty(batch, channels, height, width, device="meta")
    return Factory(build, (images, _numbers(batch)), cross_entropy)


def _timm() -> tuple[Any, str]:
    """The module, or None and why: not installed, or a torchvision that was built for another torch."""
    try:
        return optional("timm", extra="peers"), ""
    except (ImportError, RuntimeError, AttributeError) as error:
        return None, str(error).splitlines()[0]


def _numbers(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.long)
