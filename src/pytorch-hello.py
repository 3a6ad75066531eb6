#!/usr/bin/env python3
"""A tensor, a derivative and a fitted line: `poetry run src/pytorch-hello.py`, about 10 s."""

import argparse
import signal

import torch
from torch import Tensor, nn


def fit_line(x: Tensor, y: Tensor, steps: int, learning_rate: float) -> tuple[float, float]:
    """Fit y ≈ w·x + b, x and y (N,), by gradient descent on the mean squared error. Return w, b."""
    model = nn.Linear(1, 1, device=x.device, dtype=x.dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate)
    for _ in range(steps):
        prediction = model(x.unsqueeze(1)).squeeze(1)  # (N, 1) -> (N,)
        loss = nn.functional.mse_loss(prediction, y)
        optimizer.zero_grad()  # backward() accumulates; clear first
        loss.backward()
        optimizer.step()
    return model.weight.item(), model.bias.item()


def main(argv: list[str] | None = None) -> int:
    """Print the versions, one product, one derivative and one fitted line."""
    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    device = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    parser.add_argument("--seed", type=int, default=0, help="fixes every random choice")
    parser.add_argument("--device", default=device, help="where to compute")
    args = parser.parse_args(argv)
    if not 0 <= args.seed < 2**63:
        parser.error("argument --seed: must be between 0 and 2**63 - 1")
    torch.manual_seed(args.seed)
    try:
        A = torch.tensor([[1.0, 2.0], [3.0, 4.0]], device=args.device)
        product = (A @ A).tolist()
    except Exception as error:  # each kind of device fails in its own way
        parser.error(f"argument --device: {args.device!r} can't be used here: {error}")
    print(f"PyTorch {torch.__version__} on {A.device}\n\nA matrix times itself")
    print(f"  A       {A.tolist()}\n  A @ A   {product}\n")

    x = torch.tensor(2.0, device=args.device, requires_grad=True)
    (x**3).backward()
    print(f"The derivative of x**3 at 2\n  autograd   {x.grad}\n  3 * x**2   {3 * 2.0**2}\n")

    x = torch.linspace(-1, 1, 100)
    y = 3 * x - 2 + 0.3 * torch.randn(100)
    w, b = fit_line(x.to(args.device), y.to(args.device), steps=200, learning_rate=0.2)
    best = torch.linalg.lstsq(torch.stack((x, torch.ones(100)), dim=1), y).solution
    print("A line through 100 noisy points   slope  intercept")
    print("  the true line                  3.0000    -2.0000")
    print(f"  200 steps of gradient descent {w:7.4f}    {b:7.4f}")
    print(f"  least squares, in one go      {best[0]:7.4f}    {best[1]:7.4f}")
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # from here on, Ctrl-C leaves no traceback
    if hasattr(signal, "SIGPIPE"):  # not on Windows
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # so does `| head`
    raise SystemExit(main())
