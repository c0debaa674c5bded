"""Text from logs is untrusted: it must not be able to drive a terminal."""


def printable(text: str) -> str:
    """`text` with control characters (escape sequences begin with one) written out."""
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" if ord(c) < 256 else "\ufffd" for c in text)
