"""Pretrain a causal language model from scratch, in bf16, on packed sequences.

accelerate launch --config_file launcher/accelerate/8gpu.yaml --mixed_precision bf16 recipes/causal_lm_pretrain.py
"""

import argparse
import sys

import _common as recipe
import _smoke_data as smoke
import torch
from accelerate import Accelerator, DeepSpeedPlugin
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoModelForCausalLM

import ds_pso
from ds_pso.training.model import HeldOut, build_model, causal_loss, from_pretrained, load_tokenizer
from ds_pso.training.start import run
from ds_pso.training.text import load_corpus


def parse(argv: list[str] | None) -> argparse.Namespace:
    what = "Pretrain a causal language model from scratch."
    parser = recipe.make_parser("causal_lm_pretrain", what, steps=4000, batch_size=8, lr=1e-3)
    add = parser.add_argument
    add(
        "--model",
        default="llama:8x512",
        help="llama:<layers>x<width>, with a tokenizer trained on the data; or a local folder or hub id, of which the "
        "tokenizer and the architecture are taken, but not the weights (default: %(default)s)",
    )
    add("--dataset", default="python", help="text file, folder of them, datasets id, or python: the standard library")
    add("--seq_length", type=int, default=512, help="tokens of a packed sequence (default: %(default)s)")
    return recipe.parse(parser, argv, steps=60, lr=5e-3, model="llama:2x64", seq_length=32)


def train(arguments: argparse.Namespace) -> None:
    with ds_pso.init(run_dir=arguments.output_dir) as swarm:  # first: it finds the JSON that accelerate launch names
        accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=swarm.ds_config))
        recipe.begin(swarm, arguments)
        dataset, folder, length = arguments.dataset, arguments.output_dir / "data", arguments.seq_length
        if arguments.smoke:
            dataset = recipe.make_once(swarm, arguments.output_dir / "made", smoke.make_text)
        with swarm.world.coordinator.agree("loading the tokenizer"):
            tokenizer = load_tokenizer(arguments.model)
        corpus = load_corpus(swarm, dataset, folder, length, tokenizer)

        torch.manual_seed(arguments.seed)
        with swarm.world.coordinator.agree("building the model"):
            if arguments.model.startswith("llama:"):
                model = build_model(arguments.model, corpus.tokenizer, length, swarm.ds_config)
            else:
                architecture = from_pretrained(AutoConfig, arguments.model)
                model = AutoModelForCausalLM.from_config(architecture, dtype=torch.float32)
        batch_size = recipe.batch_size(swarm, arguments)
        loader = DataLoader(corpus.train, batch_size=batch_size, shuffle=True)
        held_out = HeldOut(swarm, corpus.held_out, batch_size, accelerator.device, num_batches=16)
        engine, loader, *_ = swarm.prepare(
            accelerator, model, loader, *recipe.stand_ins(swarm, model, arguments), probe=lambda index: score(index)
        )
        score = held_out.probe(engine)

        for batch in recipe.batches(swarm, engine, loader, arguments.steps):
            with accelerator.accumulate(engine):
                loss = causal_loss(engine, batch)
                accelerator.backward(loss)  # takes the optimizer's step, too, and syncs when it is due

        with swarm.consensus():
            losses = held_out.evaluate(engine)  # of each particle, all with the same weights now
        swarm.export(arguments.output_dir / "model", tokenizer=corpus.tokenizer)
        recipe.finish(swarm, arguments, "held_out_loss", sum(losses) / len(losses))


def main(argv: list[str] | None = None) -> int:
    return run(lambda: train(parse(argv)))


if __name__ == "__main__":
    sys.exit(main())
