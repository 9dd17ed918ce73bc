"""Kimi-K2 and the text part of K2.5 and later: DeepSeek-V3's layers, with all experts in one group."""

from __future__ import annotations

from dataclasses import replace

from numoe.engine.families import common, deepseek_v3, latent

FAMILY = replace(
    deepseek_v3.FAMILY,
    title="Kimi-K2, K2.5, K2.6 (text)",
    model_types=("kimi_k2", "kimi_k25"),
    names=common.also_below(common.also_below(latent.NAMES, "", "language_model."), "model.", "model.language_model."),
    ignored=(r"(model\.)?(vision_tower|mm_projector)\..*", *common.IGNORED),
    # Its files have a vocabulary of their own.
    gguf=(latent.deepseek2(latent.scores_by_sigmoid, lambda file: latent.vocabulary(file) == 163840),),
)
