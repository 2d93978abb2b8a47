def judge(
    slot: bytes,
    abi: int,
    *,
    capacity: int,
    block_sectors: int = 1,
    wire_sector: int = 1,
    read_only: bool = False,
    offered: int = 0x3,
    indirect_max: int = 0,
    pages: bytes | None = None,
) -> tuple[int, int, int]: ...
