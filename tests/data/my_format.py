def my_format(raw: dict) -> dict:
    """{"file": "cat.jpg", "question": "What is it?", "answers": ["A cat."]} -> a standard item."""
    if not raw["answers"]:
        raise ValueError("no answer: the list is empty")  # a reject with this reason
    return {
        "id": raw["file"],
        "conversations": [
            {"from": "human", "value": f"<|image|> {raw['question']}"},
            {"from": "gpt", "value": raw["answers"][0]},
        ],
        "image": [raw["file"]],
    }
