"""Fine-tune a causal language model, from a local folder or the hub, on text of yours: all of it, or LoRA adapters.

accelerate launch --config_file launcher/accelerate/8gpu.yaml --mixed_precision bf16 recipes/causal_lm_finetune.py

With --lora only adapters are trained, and only they travel at sync points and are exported. It needs peft.
"""

import argparse
import sys

import _common as recipe
import _smoke_data as smoke
import torch
from accelerate import Accelerator, DeepSpeedPlugin
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

import ds_pso
from ds_pso.training.model import HeldOut, causal_loss, from_pretrained
from ds_pso.training.start import run
from ds_pso.training.text import load_corpus


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = recipe.make_parser(
        "causal_lm_finetune", "Fine-tune a causal language model.", steps=500, batch_size=4, lr=1e-4
    )
    add = parser.add_argument
    add("--model", default="HuggingFaceTB/SmolLM2-135M", help="local folder or hub id (default: %(default)s)")
    add("--dataset", default="python", help="text file, folder of them, datasets id, or python: the standard library")
    add("--seq_length", type=int, default=512, help="tokens of a packed sequence (default: %(default)s)")
    add("--lora", action="store_true", help="train low-rank adapters of all linear layers, and nothing else")
    add("--lora_rank", type=int, default=16, help="of the adapters (default: %(default)s)")
    return recipe.parse(parser, argv, steps=60, batch_size=8, lr=5e-3, seq_length=32)


def train(arguments: argparse.Namespace) -> None:
    with ds_pso.init(run_dir=arguments.output_dir) as swarm:  # first: it finds the JSON that accelerate launch names
        accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=swarm.ds_config))
        recipe.begin(swarm, arguments)
        base, dataset, folder = arguments.model, arguments.dataset, arguments.output_dir / "data"
        if arguments.smoke:  # the base has learned another language than that of the data
            base = recipe.make_once(swarm, arguments.output_dir / "base", smoke.make_llama)
            dataset = recipe.make_once(
                swarm, arguments.output_dir / "made", lambda path: smoke.make_text(path, language=1)
            )
        with swarm.world.coordinator.agree("loading the model"):
            tokenizer = from_pretrained(AutoTokenizer, base)
            model = from_pretrained(AutoModelForCausalLM, base, dtype=torch.float32)
        corpus = load_corpus(swarm, dataset, folder, arguments.seq_length, tokenizer)

        torch.manual_seed(arguments.seed)
        if arguments.lora:
            from peft import LoraConfig, get_peft_model

            rank = arguments.lora_rank
            config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
            model = get_peft_model(model, config)
        batch_size = recipe.batch_size(swarm, arguments)
        loader = DataLoader(corpus.train, batch_size=batch_size, shuffle=True)
        held_out = HeldOut(swarm, corpus.held_out, batch_size, accelerator.device, num_batches=16)
        engine, loader, *_ = swarm.prepare(
            accelerator, model, loader, *recipe.stand_ins(swarm, model, arguments), probe=lambda index: score(index)
        )
        score = held_out.probe(engine)
        before = held_out.evaluate(engine)
        torch.manual_seed(arguments.seed + swarm.world.layout.rank)  # so that dropout differs between ranks

        for batch in recipe.batches(swarm, engine, loader, arguments.steps):
            with accelerator.accumulate(engine):
                loss = causal_loss(engine, batch)
                accelerator.backward(loss)  # takes the optimizer's step, too, and syncs when it is due

        with swarm.consensus():
            losses = held_out.evaluate(engine)  # of each particle, all with the same weights now
        swarm.export(arguments.output_dir / "model", tokenizer=tokenizer)  # with --lora the adapters alone
        if swarm.is_leader:
            print(f"held-out loss of the base {sum(before) / len(before):.4f}")
        recipe.finish(swarm, arguments, "held_out_loss", sum(losses) / len(losses))


def main(argv: list[str] | None = None) -> int:
    return run(lambda: train(parse(argv)))


if __name__ == "__main__":
    sys.exit(main())
