"""The supported architectures, as rows of data (DESIGN 4.7). Imports neither torch nor transformers.

A row names where a decoder layer keeps its parts; `lemo.models.view` turns a row and a layer into what sparse
execution needs. Adding a model whose layer is `h + attention(norm(h))`, then `h + mlp(norm(h))`, is adding a row.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Architecture:
    """Names of a decoder layer's parts.

    Attributes:
        model_type: transformers' `config.model_type`.
        decoder: path from the CausalLM to the module whose `layers` are the decoder layers.
        attention: the attention module; its projections follow.
        query, key, value, output: projections inside the attention module.
        query_norm, key_norm: per-head norms inside the attention module, None where the model has none.
        attention_norm, mlp_norm: the branches' norms.
        mlp: the MLP module; None where its linears (`up`, `down`) sit in the layer itself.
        gate, up, down: linears of the MLP; gate None where the MLP has none.
        activation: attribute of the activation function, beside the linears.
        rotary: whether positions enter by rotation of queries and keys.
        scale_query: whether 1/sqrt(d) multiplies the query projection, so that attention scales by 1.
        hidden_dropout: layer attribute with the probability of dropout on each branch's output, None for none.
        pre_norm_flag: layer attribute that is False where norms follow the addition, None if always pre-norm.
        packs: whether transformers isolates packed documents itself when position_ids restart.
    """

    model_type: str
    decoder: str = "model"
    attention: str = "self_attn"
    query: str = "q_proj"
    key: str = "k_proj"
    value: str = "v_proj"
    output: str = "o_proj"
    query_norm: str | None = None
    key_norm: str | None = None
    attention_norm: str = "input_layernorm"
    mlp_norm: str = "post_attention_layernorm"
    mlp: str | None = "mlp"
    gate: str | None = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    activation: str = "act_fn"
    rotary: bool = True
    scale_query: bool = False
    hidden_dropout: str | None = None
    pre_norm_flag: str | None = None
    packs: bool = True


ARCHITECTURES: dict[str, Architecture] = {
    row.model_type: row
    for row in (
        Architecture("llama"),
        Architecture("mistral"),
        Architecture("qwen2"),
        Architecture("qwen3", query_norm="q_norm", key_norm="k_norm"),
        Architecture(
            "opt",
            decoder="model.decoder",
            output="out_proj",
            attention_norm="self_attn_layer_norm",
            mlp_norm="final_layer_norm",
            mlp=None,
            gate=None,
            up="fc1",
            down="fc2",
            activation="activation_fn",
            rotary=False,
            scale_query=True,
            hidden_dropout="dropout",
            pre_norm_flag="do_layer_norm_before",
            packs=False,
        ),
    )
}


def supported() -> tuple[str, ...]:
    """Supported `model_type`s, sorted."""
    return tuple(sorted(ARCHITECTURES))


def architecture_of(model_type: str) -> Architecture:
    """The row of a `model_type`.

    Raises:
        ValueError: not supported; lists what is.
    """
    row = ARCHITECTURES.get(model_type)
    if row is None:
        raise ValueError(
            f"lemo doesn't support the architecture '{model_type}'; supported: {', '.join(supported())}. "
            "docs/adding-a-model.md says how to add one"
        )
    return row
