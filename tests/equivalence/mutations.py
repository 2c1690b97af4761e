"""Ways to break the sharded step on purpose."""


def apply_mutation(name: str) -> None:
    raise ValueError(f"unknown mutation {name!r}")
