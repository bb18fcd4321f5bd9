from megatron_dynmix.data.prepare.notices import OTHERS, Notice, Noticed, merged, noticed


def test_what_rows_have_is_added_up_with_the_first_place() -> None:
    images, key = Notice("unused key", "images"), Notice("unknown key", "id")
    first, second = noticed("f:1", [images, key, images]), noticed("f:2", [images])
    assert merged([*first, *second]) == (
        Noticed(kind="unused key", detail="images", rows=2, first="f:1"),
        Noticed(kind="unknown key", detail="id", rows=1, first="f:1"),
    )
    assert merged([*merged(first), *merged(second)]) == merged([*first, *second])


def test_endless_details_are_counted_together() -> None:
    rows = [noticed(f"f:{n}", [Notice("unknown key", f"k{n}")]) for n in range(50)]
    flat = [one for row in rows for one in row]
    total = merged(flat)
    assert total == merged([*merged(flat[:30]), *merged(flat[30:])])
    assert sum(one.rows for one in total) == 50
    assert total[-1] == Noticed(kind="unknown key", detail=OTHERS, rows=30, first="f:20")
