def judge(
    slot: bytes,
    abi: int,
    *,
    capacity: int,
    logical_sectors: int = 1,
    read_only: bool = False,
    offered: int = 0x3,
) -> tuple[int, int, int]: ...
