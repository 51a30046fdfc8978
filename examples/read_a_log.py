"""Reading a correction log, as one would in a notebook: cells between ``# %%``, tables and figures.

Any run has such a log in its folder, under ``eafo/``. Without the name of one this trains a small network first.

Run: python examples/read_a_log.py [RUN]
Needs: pip install 'eafo-dynamic[plots,examples]'
"""

# %% a run to look into
from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
from lightning.pytorch import Trainer, seed_everything

from eafo_dynamic import CorrectionLog, EAFOCallback
from eafo_dynamic.experiments import MLP, Regressor, TabularData
from eafo_dynamic.records.figures.logs import plot

out = Path(tempfile.mkdtemp())
run = Path(sys.argv[1]) if len(sys.argv) > 1 else out / "run"
if len(sys.argv) == 1:
    seed_everything(0, verbose=False)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    callback = EAFOCallback(update_every_n_steps=10, dirpath=run / "eafo", verbose=False)
    trainer = Trainer(max_epochs=30, callbacks=[callback], enable_model_summary=False, **quiet)
    model = MLP(in_features=10, out_features=1, hidden=(64, 64, 64), activation="silu")
    trainer.fit(Regressor(model=model, lr=3e-3), TabularData("diabetes", batch_size=64))

# %% one row a site an update
log = CorrectionLog.load(run)
print(log)
frame = log.to_pandas()
print(
    frame[["step", "site", "eps", "entropy", "d_entropy_d_eps", "atom_mass"]]
    .tail(len(log.sites))
    .to_string(index=False)
)

# %% how far has each layer come?
first, last = frame.groupby("site").first(), frame.groupby("site").last()
print((last[["eps", "entropy", "negentropy"]] - first[["eps", "entropy", "negentropy"]]).round(4).to_string())

# %% did the entropy do what the gradient predicted?
predicted, measured = frame["entropy_predicted"] - frame["entropy"], frame["entropy_after"] - frame["entropy"]
print(f"correlation of predicted and measured changes at updates: {predicted.corr(measured):.3f}")

# %% what was out of the ordinary?
for event in log.events():
    print(f"step {event['step']}  {event['site']}: {event['event']}")

# %% figures on board
for what in ("functions", "trajectories", "prediction"):
    plot(log, what, "eps").savefig(out / f"{what}.png", dpi=100)

# %% a figure of one's own
figure, axes = plt.subplots(figsize=(6, 3.2), layout="constrained")
for site in log.sites:
    axes.plot(log.series(site, "step"), log.series(site, "d_entropy_d_eps"), label=site)
axes.axhline(0, color="0.7", linewidth=0.8)
axes.set(xlabel="optimiser steps", ylabel="dH/d eps, nats", title="Which way each layer's entropy points")
axes.legend()
figure.savefig(out / "gradients.png", dpi=100)
print(f"figures: {', '.join(sorted(path.name for path in out.glob('*.png')))} in {out}")
