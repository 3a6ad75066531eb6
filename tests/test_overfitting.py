"""The picture of overfitting shows what it says: training goes on improving, validation turns."""

import pytest
import torch

import overfitting

fashion = overfitting.fashion


def test_the_scores_are_those_of_both_splits_and_are_drawn(monkeypatch, capsys, tmp_path):
    images, labels = fashion.load(fashion.SAMPLE, "train")
    few = images[:320], labels[:320]
    monkeypatch.setattr(fashion, "load", lambda folder, name: few)
    monkeypatch.setattr(overfitting, "HELD_OUT", 160)
    scored = []

    def score(model, *split):
        scored.append(split)
        return original(model, *split)

    original = overfitting.score
    monkeypatch.setattr(overfitting, "score", score)
    overfitting.main(["--epochs", "12", "--out", str(tmp_path / "drawn.png")])
    assert (tmp_path / "drawn.png").read_bytes().startswith(b"\x89PNG")
    last = capsys.readouterr().out.splitlines()[-1].replace("%", "").split()
    epoch, loss, accuracy, _, validation_accuracy = map(float, last)
    assert epoch == 12 and accuracy > validation_accuracy + 5 and loss < 1
    (x, _), (val_x, _) = scored[:2]
    together = torch.cat((x, val_x)).flatten(1).tolist()
    assert sorted(together) == sorted(few[0].flatten(1).tolist())  # each image in one split


def test_the_score_is_the_cross_entropy_and_the_share_of_right_answers():
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Dropout(1.0))  # which does nothing
    logits = torch.tensor([[2.0, 1, 0], [2, 1, 0], [2, 1, 0], [2, 1, 0]])
    loss, accuracy = overfitting.score(model, logits, torch.tensor([0, 1, 2, 0]))
    assert loss == pytest.approx((0.41 + 1.41 + 2.41 + 0.41) / 4, abs=0.005)
    assert accuracy == 0.5


@pytest.mark.slow
def test_validation_turns_while_training_goes_on():
    torch.manual_seed(0)
    rows = [*overfitting.overfit(40, batch_size=500, learning_rate=0.0002)]
    (loss, accuracy), (val_loss, _) = rows[-1]
    lowest = min(val for _, (val, _) in rows)
    assert loss < 0.05 and accuracy > 0.98
    assert rows.index(next(row for row in rows if row[1][0] == lowest)) < 20
    assert val_loss > lowest + 0.05
