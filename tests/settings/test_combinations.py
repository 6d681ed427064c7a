"""Settings that cannot be together: each pair is refused by name, with what to do, and neither alone is."""

from __future__ import annotations

import math

import pytest

from fed_dpsat.errors import SettingError
from fed_dpsat.settings.config import RunConfig

GOOD = {"target_epsilon": 3.0}
BUFFER = {"buffer_size": 2, "delay": "lognormal"}
CLIENT = {"privacy_unit": "client"}
COINS = {"client_sampling": "poisson", "clients_per_round": 2}
SECURE = {"secure_aggregation": True}
LAPLACE = {"noise_distribution": "laplace", "clipping": "l1"}
LATE = {"train_layers": "head-then-all", "unfreeze_round": 2}


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("noise_multiplier=1.0", ["noise_multiplier=1.0", "target_epsilon=3.0", "set the other to 0"]),
        ("budget_mode=retire", ["noise_multiplier=0.0", "budget_mode='retire'"]),
        ("min_clients=11", ["min_clients=11", "10 clients of a round"]),
        ("target_epsilon=0", ["target_epsilon=0.0", "noise_multiplier=0", "private=false"]),
        ("clip_norm=inf", ["clip_norm=inf", "finite"]),
        ("delta=1", ["delta=1.0", "(0, 1)"]),
        ("momentum=1", ["momentum=1.0", "[0, 1)"]),
        ("clients_per_round=11", ["clients_per_round=11", "num_clients=10"]),
        ("max_rounds_per_client=2", ["max_rounds_per_client=2", "num_rounds=30"]),
        ("device=gpu", ["device='gpu'", "cpu, cuda, cuda:N, auto"]),
        ("device=cuda:-1", ["device='cuda:-1'", "cuda:N"]),
        ("gpus_per_worker=0.5", ["gpus_per_worker=0.5", "workers=0"]),
    ],
)
def test_the_refusal_names_key_value_bound_and_remedy(override, words):
    with pytest.raises(SettingError) as caught:
        RunConfig.load(None, ["target_epsilon=3.0", override])
    text = str(caught.value)
    assert all(word in text for word in words), text
    assert "\n" not in text


@pytest.mark.parametrize(
    ("good", "changes", "name"),
    [
        ({}, {"dropout_rate": 1.0}, "dropout_rate"),
        (SECURE, {"update_codec": "bf16"}, "update_codec"),
        ({"augmentations": 4}, {"features": "scattering"}, "augmentations"),
        (SECURE, BUFFER, "buffer_size"),
        (SECURE, {"clients_per_round": 2}, "secure_aggregation"),
        (BUFFER, {"buffer_size": 11}, "buffer_size"),
        (BUFFER, LATE, "buffer_size"),
        (BUFFER, {"delay": "none"}, "delay"),
        (BUFFER, {"client_sampling": "poisson"}, "client_sampling"),
        (BUFFER, CLIENT, "buffer_size"),
        ({"attack": "sign-flip", "attackers": 0.2}, {"attackers": 0.0}, "attackers"),
        ({"attack": "sign-flip", "attackers": 0.2}, {"attack": ""}, "attackers"),
        ({"attack": "sign-flip", "attackers": 0.2}, {"noise_source": "system"}, "attack"),
        ({**CLIENT, "keep_share": 0.5}, {"privacy_unit": "example"}, "keep_share"),
        (CLIENT, {"clipping": "per-layer"}, "clipping"),
        (CLIENT, SECURE, "secure_aggregation"),
        (LAPLACE, {"clipping": "flat"}, "clipping"),
        (LAPLACE, {"clipping": "adaptive"}, "clipping"),
        (LAPLACE, {"accountant": "rdp"}, "accountant"),
        ({**LAPLACE, "accountant": "rdp", "sample_rate": 1.0}, {"sample_rate": 0.5}, "accountant"),
        ({"clipping": "l1"}, {"noise_distribution": "laplace", "accountant": "rdp"}, "accountant"),
        (CLIENT, {"update_codec": "bf16"}, "update_codec"),
        (CLIENT, {"client_table": "clients.csv"}, "client_table"),
        (CLIENT, {"release_counts": True}, "release_counts"),
        ({**CLIENT, **COINS}, {"max_rounds_per_client": 20}, "max_rounds_per_client"),
        ({"workers": 1}, {"workers": 0, "ray_address": "auto"}, "workers"),
        (LATE, {"personal_layers": "head"}, "personal_layers"),
        (LATE, {"unfreeze_round": 1}, "unfreeze_round"),
        (LATE, {"num_rounds": 1}, "unfreeze_round"),
        (LATE, {"train_layers": "head"}, "unfreeze_round"),
        ({"start_from": "x.pt", "start_head": "new"}, {"start_from": ""}, "start_head"),
        ({"train_layers": "last", "last_layers": 2}, {"train_layers": "all"}, "last_layers"),
        ({"adapter": "lora"}, {"train_layers": "head"}, "train_layers"),
        ({"adapter": "ffa-lora"}, LATE, "train_layers"),
        ({"train_layers": "bias"}, {"adapter": "lora"}, "train_layers"),
        ({"adapter": "lora", "adapter_rank": 4}, {"adapter": ""}, "adapter_rank"),
        ({"adapter": "lora", "adapter_rank": 4}, {"adapter_rank": 0}, "adapter_rank"),
        ({"adapter": "lora", "adapter_alpha": 4}, {"adapter": ""}, "adapter_alpha"),
        ({"adapter": "lora", "adapter_targets": "query"}, {"adapter": ""}, "adapter_targets"),
        ({"private": False, "target_epsilon": 0.0, "clip_norm": math.inf}, {"private": True}, "target_epsilon"),
    ],
)
def test_what_is_good_is_refused_with_the_change(good, changes, name):
    RunConfig(**{**GOOD, **good})
    with pytest.raises(SettingError, match=f"^{name}="):
        RunConfig(**{**GOOD, **good, **changes})


@pytest.mark.parametrize(
    ("device", "gpus_per_worker", "words"),
    [
        ("cuda", 0.0, "gpus_per_worker=0.0 is not enough for device='cuda' with workers=2: Ray would give them none"),
        ("cpu", 0.5, "gpus_per_worker=0.5 is not possible with device='cpu'"),
        ("cuda:1", 0.5, "device='cuda:1' is not possible with workers=2"),
    ],
)
def test_cards_of_workers_are_rays_to_give(device, gpus_per_worker, words):
    with pytest.raises(SettingError, match=words):
        RunConfig(**GOOD, workers=2, device=device, gpus_per_worker=gpus_per_worker)
    RunConfig(**GOOD, workers=2, device="cuda", gpus_per_worker=0.5)
