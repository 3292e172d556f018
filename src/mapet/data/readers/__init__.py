"""Readers of image files, one module a family of formats, tried in the order of `decode.READERS`.

A module has

    EXTENSIONS                             by which folders are searched
    TAKES_BYTES                            whether it opens a file's bytes, never its path
    matches(head, name)                    looks at a file's first bytes, and its name ('' of one in an archive)
    open_image(file, channels, window)     returns a `LazyImage`, or raises `BadImage`

A reader that cannot give the pixels as they are stored must raise: an image is never misread silently.
"""
