"""The model card of a protected model."""

from __future__ import annotations

from typing import Any

import yaml

from pipeline.protect_model.plan import ModelPlan

_TEXT = """# {base}, protected against personalization

The UNet of `{base}` was changed by `{method}` (preset `{preset}`) so that this checkpoint resists being personalized,
by DreamBooth and its kin, on photos of {count} ({words}). Text encoder, VAE, tokenizer and scheduler are the given
model's, byte for byte. It is used as the given model is:

```python
from diffusers import StableDiffusionPipeline

pipeline = StableDiffusionPipeline.from_pretrained("this folder", safety_checker=None)
```

| | |
|---|---|
| digest of the given model | `{digest}` |
| digest of this model | `{new_digest}` |
| updates | {updates} |
| steps of a simulated attacker per update | {inner} |
| relative change of the UNet's weights (L2) | {drift:.3g} |
| largest change of one weight | {largest:.3g} |
{curves}
`provenance.json` has the configuration, the seed, hashes of the photos that were used, the versions and all curves;
`curves.png` shows them. The photos themselves are not in this folder. `positives/` has what stood beside them in the
training, each with the hash of its photo: pictures of the class that the given model drew itself.

## Limits

- **Whoever has the given model's weights is not hindered.** This helps where people personalize this checkpoint: a
  hosted model, or one that was never published unprotected.
- That the training ran says nothing about how well it protects: the effect against an attacker was not measured here.
  Other identifiers than those of the configuration, other ways to train (LoRA, other rates, more steps) and other
  photos of the subject may get through. Measure them before you rely on it.
- Other subjects of the same class and other images may suffer. Measure that too.
- Weights are float32. Rounding them to 16 bits takes away part of the change.
- The licence of the given model holds for this one.
"""


def model_card(plan: ModelPlan, document: dict[str, Any]) -> str:
    """Markdown with the front matter that model hubs read.

    Args:
        plan: what was done.
        document: the model's provenance.
    """
    front: dict[str, Any] = {"library_name": "diffusers", "pipeline_tag": "text-to-image", "tags": ["fixative"]}
    if "/" in plan.base_name:  # a hub id
        front["base_model"] = plan.base_name
    facts, words = document["facts"], [concept.class_word for concept in plan.concepts]
    text = _TEXT.format(
        base=plan.base_name,
        method=document["identity"]["method"],
        preset=plan.preset,
        count="one subject" if len(words) == 1 else f"{len(words)} subjects",
        words=", ".join(words),
        digest=document["identity"]["base"],
        new_digest=document["weights"]["digest"],
        updates=facts["updates"],
        inner=plan.inner_steps,
        drift=facts["drift"],
        largest=facts["largest_change"],
        curves="".join(
            f"| {name}, first and last update | {curve[0]:.4g}, {curve[-1]:.4g} |\n"
            for name, curve in document["curves"].items()
        ),
    )
    return f"---\n{yaml.safe_dump(front, sort_keys=True)}---\n\n{text}"
