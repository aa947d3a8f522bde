"""Fine-tune a pretrained encoder, from a local folder or the hub, to tell kinds of texts apart.

accelerate launch --config_file launcher/accelerate/8gpu.yaml --mixed_precision bf16 recipes/seq_classification.py
"""

import argparse
import sys

import _common as recipe
import _smoke_data as smoke
import torch
from _classification import accuracy, load_splits, probe
from accelerate import Accelerator, DeepSpeedPlugin
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import ds_pso
from ds_pso.training.model import from_pretrained
from ds_pso.training.start import run


def parse(argv: list[str] | None) -> argparse.Namespace:
    what = "Fine-tune an encoder to classify texts."
    parser = recipe.make_parser("seq_classification", what, steps=1000, batch_size=16, lr=5e-5)
    parser.add_argument(
        "--model", default="distilbert/distilbert-base-uncased", help="local folder or hub id (default: %(default)s)"
    )
    parser.add_argument(
        "--dataset",
        default="stanfordnlp/imdb",
        help="local folder or hub id, with text and label (default: %(default)s)",
    )
    parser.add_argument(
        "--max_length", type=int, default=256, help="tokens of a text; the rest is cut off (default: %(default)s)"
    )
    return recipe.parse(parser, argv, steps=40, lr=3e-3)


def train(arguments: argparse.Namespace) -> None:
    with ds_pso.init(run_dir=arguments.output_dir) as swarm:  # first: it finds the JSON that accelerate launch names
        accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=swarm.ds_config))
        recipe.begin(swarm, arguments)
        base, folder, cache = arguments.model, arguments.dataset, None
        if arguments.smoke:
            cache = arguments.output_dir / "cache"
            base = recipe.make_once(swarm, arguments.output_dir / "base", smoke.make_bert)
            folder = recipe.make_once(swarm, arguments.output_dir / "made", smoke.make_reviews)
        data = load_splits(swarm, folder, {"text": ("text", "sentence")}, cache)

        torch.manual_seed(arguments.seed)
        with swarm.world.coordinator.agree("loading the model"):
            tokenizer = from_pretrained(AutoTokenizer, base)
            kind, options = AutoModelForSequenceClassification, {"num_labels": data.num_classes, "dtype": torch.float32}
            model = from_pretrained(kind, base, **options)
        batch_size = recipe.batch_size(swarm, arguments)

        def collate(rows: list[dict[str, object]]) -> dict[str, Tensor]:
            texts = [row["text"] for row in rows]
            batch = tokenizer(
                texts, truncation=True, max_length=arguments.max_length, padding=True, return_tensors="pt"
            )
            return {**batch, "labels": torch.tensor([row["labels"] for row in rows])}

        def logits(batch: dict[str, Tensor]) -> Tensor:
            inputs = {name: tensor.to(engine.device) for name, tensor in batch.items() if name != "labels"}
            return engine(**inputs).logits

        loader = DataLoader(data.train, batch_size=batch_size, shuffle=True, collate_fn=collate)
        engine, loader, *_ = swarm.prepare(
            accelerator, model, loader, *recipe.stand_ins(swarm, model, arguments), probe=lambda index: score(index)
        )
        score = probe(swarm, engine, data.probe, logits, batch_size, collate)
        torch.manual_seed(arguments.seed + swarm.world.layout.rank)  # so that dropout differs between ranks

        for batch in recipe.batches(swarm, engine, loader, arguments.steps):
            with accelerator.accumulate(engine):
                loss = F.cross_entropy(logits(batch).float(), batch["labels"])
                accelerator.backward(loss)  # takes the optimizer's step, too, and syncs when it is due

        with swarm.consensus():
            result = accuracy(swarm, engine, data.test, logits, batch_size, collate)
        swarm.export(arguments.output_dir / "model", tokenizer=tokenizer)
        recipe.finish(swarm, arguments, "accuracy", result)


def main(argv: list[str] | None = None) -> int:
    return run(lambda: train(parse(argv)))


if __name__ == "__main__":
    sys.exit(main())
