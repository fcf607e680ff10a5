"""Images or latents to a sequence of tokens, and back."""

from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor


def grid_side(img_size: int, vae_stride: int, patch_size: int) -> int:
    """Count the tokens along a side of a square image; raise ValueError if they are not whole."""
    cell = vae_stride * patch_size
    if img_size < cell or img_size % cell:
        raise ValueError(
            f"image size {img_size} is not a multiple of vae_stride * patch_size = {cell}; "
            f"crop or pad to {max(1, -(-img_size // cell)) * cell}"
        )
    return img_size // cell


def patchify(latents: Float[Tensor, "B C H W"], patch_size: int) -> Float[Tensor, "B L D"]:
    """Cut each image into square patches and lay each patch out as one token.

    Tokens are in raster order; inside a token the order is channel, row, column, D = C * p * p.
    Raises ValueError if `patch_size` does not divide H and W.
    """
    height, width = latents.shape[-2:]
    if height % patch_size or width % patch_size:
        raise ValueError(
            f"patch_size {patch_size} does not divide the {height}x{width} input; crop or pad to "
            f"{-(-height // patch_size) * patch_size}x{-(-width // patch_size) * patch_size}"
        )
    return rearrange(latents, "b c (h p) (w q) -> b (h w) (c p q)", p=patch_size, q=patch_size)


def unpatchify(
    tokens: Float[Tensor, "B L D"], patch_size: int, grid: tuple[int, int] | None = None
) -> Float[Tensor, "B C H W"]:
    """Put tokens back into their places: the inverse of `patchify`.

    grid  (rows, columns) of tokens, a square by default; ValueError if they do not fill it
    """
    length, dim = tokens.shape[1:]
    side, p = round(length**0.5), patch_size
    rows, columns = grid or (side, side)
    if rows * columns != length:
        raise ValueError(f"{length} tokens do not fill a {rows}x{columns} grid; pass their grid")
    if dim % p**2:
        raise ValueError(f"token width {dim} is no multiple of {p}^2; use the tokens' patch size")
    return rearrange(tokens, "b (h w) (c p q) -> b c (h p) (w q)", h=rows, w=columns, p=p, q=p)


def take(x: Float[Tensor, "A L D"], positions: Int[Tensor, "B K"]) -> Float[Tensor, "B K D"]:
    """x at those positions of each row; x may have one row for all."""
    x = x.expand(len(positions), -1, -1)
    return x.gather(1, positions[..., None].expand(-1, -1, x.shape[-1]))
