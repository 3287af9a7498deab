"""FlashVSR: videos of any length made two or four times as large, by Wan's transformer in one step."""
