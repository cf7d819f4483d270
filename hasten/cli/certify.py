"""Prove that a model computes under Hasten what it computes without.

Exit status 0 if the certificate passed without falling back, 1 otherwise.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from hasten.cli.load import add_model, check_output, load_model
from hasten.errors import ConfigError


def arguments(p: argparse.ArgumentParser) -> None:
    add_model(p, positional=True)
    p.add_argument("--seed", type=int, default=0, help="of the random inputs")
    p.add_argument("--blocks", action="store_true", help="print every block's errors")
    p.add_argument("--json", type=Path, metavar="FILE", help="write the certificate to a file as well")


def run(args: argparse.Namespace) -> int:
    import hasten

    check_output("--json", args.json)
    if not 0 <= args.seed < 2**63:
        raise ConfigError(f"--seed must be from 0 to 2^63 - 1, got {args.seed}")
    engine = hasten.init_inference(load_model(args.model, args.dtype), device=args.device, certify={"seed": args.seed})
    certificate = engine.certificate
    assert certificate is not None
    print(certificate)
    if args.blocks:
        for b in certificate.blocks:
            print(f"  {b.tower} {b.index}: error {b.fused:.2e}, references {b.reference:.2e}, allowed {b.allowed:.2e}")
    if args.json:
        args.json.write_text(json.dumps(certificate.to_dict(), indent=1) + "\n", encoding="utf-8")
    return 0 if certificate.passed and not certificate.fallbacks else 1
