"""Images as they come: every odd kind has one defined result, every broken one an error that names it."""

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image, TiffImagePlugin

from mllm_replica.data.images import MAX_PIXELS, ImageError, encode_png, open_image, resolve_image


def encoded(image, kind='PNG', **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def gradient(width=40, height=30):
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, 255 - x], -1).astype(np.uint8))


def png_header(width, height):
    def chunk(kind, data):
        return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))

    return (
        b'\x89PNG\r\n\x1a\n'
        + chunk(b'IHDR', struct.pack('>IIBBBBB', width, height, 8, 2, 0, 0, 0))
        + chunk(b'IDAT', b'')
        + chunk(b'IEND', b'')
    )


@pytest.mark.parametrize('kind', ['PNG', 'BMP', 'TIFF', 'GIF', 'JPEG', 'WEBP'])
def test_every_allowed_format_opens_as_rgb(kind):
    image = open_image(encoded(gradient(), kind))
    assert (image.mode, image.size) == ('RGB', (40, 30))
    assert np.abs(np.asarray(image, int) - np.asarray(gradient(), int)).mean() < 12  # lossy formats and GIF's palette


def test_format_outside_the_list_is_refused():
    with pytest.raises(ImageError, match='not a readable PNG'):
        open_image(encoded(gradient(), 'ICO'))


def test_content_decides_not_the_name(tmp_path):
    (tmp_path / 'photo.png').write_bytes(encoded(gradient(), 'JPEG'))
    assert open_image('photo.png', tmp_path).size == (40, 30)
    for name, content in {'text.png': b'just text', 'drawing.jpg': b'<svg xmlns="x"/>', 'empty.png': b''}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ImageError, match=f'{name}: not a readable'):
            open_image(name, tmp_path)


@pytest.mark.parametrize('kind', ['PNG', 'JPEG', 'WEBP', 'BMP'])
@pytest.mark.parametrize('part', [0.2, 0.5, 0.9])
def test_truncated_files_are_named(kind, part):
    content = encoded(gradient(200, 150), kind)
    with pytest.raises(ImageError, match='half.img'):
        open_image({'bytes': content[: int(len(content) * part)], 'path': 'half.img'})


def test_flipped_bytes_in_the_pixels_are_an_error():
    content = bytearray(encoded(gradient(200, 150)))
    content[len(content) // 2] ^= 0xFF
    with pytest.raises(ImageError, match='damaged or truncated'):
        open_image(bytes(content))


@pytest.mark.parametrize('side', [7000, 12000, 60000])
def test_giants_are_refused_before_decoding_and_without_warning(side):
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        with pytest.raises(ImageError, match=f'more pixels|more than the limit of {MAX_PIXELS}'):
            open_image(png_header(side, side))
    assert Image.MAX_IMAGE_PIXELS == 89478485  # Pillow's own limit is left alone


def test_cmyk_palette_and_grey():
    assert open_image(encoded(Image.new('CMYK', (3, 2), (0, 255, 255, 0)), 'JPEG')).getpixel((0, 0)) == pytest.approx(
        (255, 0, 0), abs=6
    )
    palette = Image.new('P', (2, 1))
    palette.putpalette([10, 20, 30, 200, 100, 50])
    palette.putpixel((1, 0), 1)
    assert [open_image(encoded(palette)).getpixel((x, 0)) for x in (0, 1)] == [(10, 20, 30), (200, 100, 50)]
    assert open_image(encoded(Image.new('L', (1, 1), 77))).getpixel((0, 0)) == (77, 77, 77)
    assert open_image(encoded(Image.new('1', (1, 1), 1))).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize('kind', ['PNG', 'TIFF'])
def test_16_bits_are_scaled_not_clipped(kind):
    levels = np.array([[0, 256, 32768, 65535]], dtype=np.uint16)
    image = open_image(encoded(Image.fromarray(levels), kind))
    assert [image.getpixel((x, 0))[0] for x in range(4)] == [0, 1, 128, 255]


def test_transparency_lies_on_white():
    half = open_image(encoded(Image.new('RGBA', (1, 1), (255, 0, 0, 128)))).getpixel((0, 0))
    assert half == pytest.approx((255, 127, 127), abs=1)
    assert open_image(encoded(Image.new('LA', (1, 1), (0, 0)))).getpixel((0, 0)) == (255, 255, 255)
    palette = Image.new('P', (1, 1))
    palette.putpalette([1, 2, 3])
    assert open_image(encoded(palette, transparency=0)).getpixel((0, 0)) == (255, 255, 255)
    keyed = Image.new('RGB', (1, 1), (9, 9, 9))
    assert open_image(encoded(keyed, transparency=(9, 9, 9))).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize('orientation, corner', [(1, (0, 0)), (3, (39, 29)), (6, (29, 0)), (8, (0, 39))])
def test_exif_rotation_is_applied(orientation, corner):
    image = Image.new('RGB', (40, 30), 'white')
    image.putpixel((0, 0), (255, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = open_image(encoded(image, exif=exif))
    assert upright.getpixel(corner) == (255, 0, 0)


@pytest.mark.parametrize('size', [(1, 1), (1, 5000), (5000, 1)])
def test_extreme_sizes_keep_their_shape(size):
    assert open_image(encode_png(Image.new('RGB', size, 'red'))).size == size


def test_first_frame_of_an_animation():
    content = encoded(
        Image.new('RGB', (4, 4), 'red'), 'GIF', save_all=True, append_images=[Image.new('RGB', (4, 4), 'blue')]
    )
    assert open_image(content).getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize(
    'path',
    [
        '../secret.png',
        'a/../../secret.png',
        '/secret.png',
        '..\\secret.png',
        'C:/secret.png',
        'link.png',
        'linked/secret.png',
    ],
)
def test_no_path_leaves_the_root(tmp_path, path):
    root = tmp_path / 'root'
    root.mkdir()
    (tmp_path / 'secret.png').write_bytes(encode_png(gradient()))
    (root / 'link.png').symlink_to(tmp_path / 'secret.png')
    (root / 'linked').symlink_to(tmp_path)
    with pytest.raises(ImageError, match='absolute|contains|leads outside'):
        resolve_image(path, root)
    with pytest.raises(ImageError):
        open_image({'bytes': None, 'path': path}, root)


def test_unusual_but_good_paths(tmp_path):
    folder = tmp_path / 'mit Leerzeichen und Ümlaut'
    folder.mkdir()
    (folder / 'a b..png').write_bytes(encode_png(gradient()))
    (folder / 'inner.png').symlink_to(folder / 'a b..png')
    assert open_image('a b..png', folder).size == open_image('inner.png', folder).size == (40, 30)


def test_missing_file_and_wrong_type(tmp_path):
    with pytest.raises(ImageError, match="'no.png' does not exist"):
        open_image('no.png', tmp_path)
    for wrong in (None, 3, {}, {'path': None, 'bytes': None}):
        with pytest.raises(ImageError, match='expected a path, bytes'):
            open_image(wrong)


def test_png_round_trip_is_exact():
    assert np.array_equal(np.asarray(open_image(encode_png(gradient()))), np.asarray(gradient()))


# numbers of more than eight bits


def greys(image):
    return [image.getpixel((x, 0))[0] for x in range(image.width)]


@pytest.mark.parametrize('kind', [None, 'TIFF'])
def test_int32_of_eight_bits_keeps_its_brightness(kind):
    image = Image.fromarray(np.full((9, 9), 200, dtype=np.int32))
    assert open_image(encoded(image, kind) if kind else image).getpixel((4, 4)) == (200, 200, 200)


@pytest.mark.parametrize('bits', [8, 10, 12, 14, 16])
@pytest.mark.parametrize('kind', ['PNG', 'TIFF'])
def test_fewer_bits_in_sixteen_keep_their_brightness(bits, kind):
    levels = np.array([[0, 2 ** (bits - 2), 2 ** (bits - 1), 2**bits - 1]], dtype=np.uint16)
    assert greys(open_image(encoded(Image.fromarray(levels), kind))) == [0, 64, 128, 255]


@pytest.mark.parametrize('bits', [24, 31])
def test_large_and_negative_numbers(bits):
    levels = np.array([[-7, 0, 2 ** (bits - 1), 2**bits - 1]], dtype=np.int32)
    assert greys(open_image(Image.fromarray(levels))) == [0, 0, 128, 255]


@pytest.mark.parametrize('highest, white', [(4095, 62), (65535, 3), (1023, 250)])
def test_the_maximum_that_a_file_states_decides(highest, white):
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[281] = highest
    image = Image.fromarray(np.array([[0, 1000]], dtype=np.uint16))
    found = greys(open_image(encoded(image, 'TIFF', tiffinfo=tags)))
    assert found == [0, 1000 >> (highest.bit_length() - 8)] and abs(found[1] - white) <= 1
