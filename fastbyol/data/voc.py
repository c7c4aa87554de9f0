"""Constants of Pascal VOC's segmentation format, shared by the evaluation that reads it and the
corpus that is written in it.
"""

VOID = 255  # mask value of pixels that do not count
LABELS_FILE = "labels.txt"  # names of the classes 1 .. K, one per line; not part of VOC itself


def voc_palette() -> list[int]:
    """Return the colors of VOC's masks: red, green and blue of each of the 256 values.

    The bits of the value are dealt out to the channels, lowest bit first, highest channel bit
    first.
    """
    return [
        sum((k >> (3 * bit + channel) & 1) << (7 - bit) for bit in range(8)) for k in range(256) for channel in range(3)
    ]
