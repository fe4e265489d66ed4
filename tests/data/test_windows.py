"""Windows against a plain loop over the definition, and the laws that critics rely on."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffpolicy.data.episodes import Episode, Episodes, from_list
from diffpolicy.data.spec import Spec
from diffpolicy.data.windows import Windows


def rows_of(windows: Windows) -> list[int]:
    """Step in the flat arrays that each window belongs to."""
    starts = windows.start[windows.episode]
    return [int(s + k) for s, n in zip(starts, windows.count, strict=True) for k in range(n)]


def make_episodes(lengths: list[int], terminated: list[bool], has_final: list[bool], seed: int = 0) -> Episodes:
    rng = np.random.default_rng(seed)
    return from_list(
        [
            Episode(
                obs={"obs": rng.normal(size=(n + 1, 3)).astype(np.float32)},
                action=rng.normal(size=(n, 2)).astype(np.float32),
                reward=rng.normal(size=n).astype(np.float32),
                terminated=t,
                truncated=not t,
                has_final=f,
            )
            for n, t, f in zip(lengths, terminated, has_final, strict=True)
        ]
    )


def plain_window(episode: Episode, step: int, spec: Spec, gamma: float, n_step: int) -> dict:
    """The definition, one window at a time."""
    n = len(episode)
    known = n if episode.has_final or episode.terminated else n - 1
    ahead = max(min(n_step, known - step), 0)
    chunk = [step - (spec.n_obs_steps - 1) + k for k in range(spec.horizon)]

    def history(at: int) -> np.ndarray:
        return np.stack([episode.obs["obs"][max(at + b, 0)] for b in range(1 - spec.n_obs_steps, 1)])

    return {
        "obs": history(step),
        "action": np.stack([episode.action[min(max(k, 0), n - 1)] for k in chunk]),
        "valid": np.array([0 <= k < n for k in chunk]),
        "reward": sum(gamma**j * episode.reward[step + j] for j in range(ahead)),
        "next_obs": history(step + ahead),
        "discount": 0.0 if episode.terminated and step + ahead == n else gamma**ahead,
    }


@settings(max_examples=60, deadline=None)
@given(
    episodes=st.lists(st.tuples(st.integers(1, 12), st.booleans(), st.booleans()), min_size=1, max_size=5),
    n_obs=st.integers(1, 4),
    n_action=st.integers(1, 5),
    spare=st.integers(0, 6),
    n_step=st.integers(1, 6),
)
def test_gather_equals_a_plain_loop(episodes, n_obs, n_action, spare, n_step):
    lengths, terminated, has_final = map(list, zip(*episodes, strict=True))
    data = make_episodes(lengths, terminated, has_final)
    spec = Spec({"obs": (3,)}, 2, n_obs - 1 + n_action + spare, n_obs, n_action)
    windows = Windows(data, spec, gamma=0.9, n_step=n_step)
    batch = windows.gather(torch.arange(len(windows)))
    steps = [(e, s) for e in range(len(data)) for s in range(len(data[e]))]
    assert len(windows) == len(steps)
    for i, (e, s) in enumerate(steps):
        wanted = plain_window(data[e], s, spec, 0.9, n_step)
        np.testing.assert_array_equal(batch.obs["obs"][i], wanted["obs"])
        np.testing.assert_array_equal(batch.next_obs["obs"][i], wanted["next_obs"])
        np.testing.assert_array_equal(batch.action[i], wanted["action"])
        np.testing.assert_array_equal(batch.valid[i], wanted["valid"])
        assert float(batch.reward[i]) == pytest.approx(wanted["reward"], abs=1e-5)
        assert float(batch.discount[i]) == pytest.approx(wanted["discount"], abs=1e-6)


def test_horizon_one_is_the_ordinary_mdp():
    data = make_episodes([3, 2], [True, False], [True, True])
    batch = Windows(data, Spec({"obs": (3,)}, 2, 1, 1, 1), gamma=0.5).gather(torch.arange(5))
    np.testing.assert_array_equal(batch.obs["obs"][:, 0], data.obs["obs"][[0, 1, 2, 4, 5]])
    np.testing.assert_array_equal(batch.next_obs["obs"][:, 0], data.obs["obs"][[1, 2, 3, 5, 6]])
    np.testing.assert_array_equal(batch.action[:, 0], data.action)
    np.testing.assert_array_equal(batch.reward, data.reward)
    np.testing.assert_array_equal(batch.discount, [0.5, 0.5, 0.0, 0.5, 0.5])


def test_n_step_reward_by_hand_at_a_true_end_and_at_a_time_limit():
    data = make_episodes([3, 3], [True, False], [True, True])
    data.reward[:] = [1, 2, 4, 1, 2, 4]
    batch = Windows(data, Spec({"obs": (3,)}, 2, 4, 1, 4), gamma=0.5, n_step=2).gather(torch.arange(6))
    np.testing.assert_allclose(batch.reward, [2, 4, 4, 2, 4, 4])
    np.testing.assert_allclose(batch.discount, [0.25, 0, 0, 0.25, 0.25, 0.5])


def test_require_next_leaves_out_only_steps_whose_next_observation_was_never_recorded():
    data = make_episodes([2, 3, 2], [False, True, False], [False, False, True])
    windows = Windows(data, Spec({"obs": (3,)}, 2, 1, 1, 1), require_next=True)
    assert rows_of(windows) == [0, 2, 3, 4, 5, 6]


def test_only_takes_windows_of_the_named_episodes():
    data = make_episodes([2, 3, 2], [True] * 3, [True] * 3)
    windows = Windows(data, Spec({"obs": (3,)}, 2, 1, 1, 1), only=np.array([0, 2]))
    assert rows_of(windows) == [0, 1, 5, 6]


def test_float64_data_is_gathered_as_float32():
    data = make_episodes([3, 2], [True, False], [True, True])
    wide = Episodes(
        {"obs": data.obs["obs"].astype(np.float64)},
        data.action.astype(np.float64),
        data.reward.astype(np.float64),
        data.length,
        data.terminated,
        data.truncated,
    )
    batch = Windows(wide, Spec({"obs": (3,)}, 2, 1, 1, 1)).gather(torch.arange(5))
    assert {batch.obs["obs"].dtype, batch.action.dtype, batch.reward.dtype} == {torch.float32}
    np.testing.assert_array_equal(batch.action[:, 0], data.action)


@given(
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    n_step=st.integers(1, 5),
    data=st.data(),
)
def test_a_return_ends_at_the_first_masked_step_as_a_plain_loop_says(lengths, n_step, data):
    total = sum(lengths)
    mask = np.array(data.draw(st.lists(st.booleans(), min_size=total, max_size=total)))
    terminated = np.array(data.draw(st.lists(st.booleans(), min_size=len(lengths), max_size=len(lengths))))
    reward = np.arange(1, total + 1, dtype=np.float32)
    episodes = Episodes(
        obs={"obs": np.arange(total + len(lengths), dtype=np.float32)[:, None]},
        action=np.zeros((total, 1), np.float32),
        reward=reward,
        length=np.array(lengths),
        terminated=terminated,
        truncated=~terminated,
        info={"mask": mask},
    )
    batch = Windows(episodes, Spec({"obs": (1,)}, 1, 1, 1, 1), gamma=0.5, n_step=n_step).gather(torch.arange(total))
    row = 0
    for e, length in enumerate(lengths):
        for step in range(length):
            wanted, discount, k = 0.0, 1.0, 0
            while k < n_step and step + k < length:
                wanted += 0.5**k * reward[row + k]
                k += 1
                if not mask[row + k - 1]:
                    discount = 0.0
                    break
            if step + k == length and terminated[e]:
                discount = 0.0
            assert batch.reward[row].item() == pytest.approx(wanted)
            assert batch.discount[row].item() == pytest.approx(discount * 0.5**k)
            assert batch.next_obs["obs"][row].item() == row + e + k
            row += 1
