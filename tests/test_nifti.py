"""Reading and writing NIfTI: nibabel is the reference for what is read, and for what was written."""

from __future__ import annotations

import csv
import errno
import gzip
import importlib.util
import io
import os
import struct
import uuid
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from medjax.data import nifti
from medjax.data.volume import Volume
from medjax.errors import UserError

OBLIQUE = nib.affines.from_matvec(
    np.array([[0.9, -0.3, 0.1], [0.3, 0.9, 0.05], [-0.1, 0.02, 2.4]]), [-12.3, 45.6, -7.8]
)


@pytest.fixture(autouse=True)
def _forget(monkeypatch):
    """Every test meets notes for the first time."""
    monkeypatch.setattr(nifti, "_reported", set())
    monkeypatch.setattr("medjax.errors._said", set())


def save(path: Path, data: np.ndarray, affine=None, klass=nib.Nifti1Image, **header) -> Path:
    image = klass(data, np.eye(4) if affine is None else affine)
    for key, value in header.items():
        image.header[key] = value
    nib.save(image, path)
    return path


def voxels(dtype=np.int16, shape=(5, 6, 7)) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 100, shape).astype(dtype)


# ------------------------------------------------------------------------------------------- the real odd files

# What each file of odd_files/manifest.csv must do: words of the refusal, or None to be read.
REFUSED = {
    "real/5d_warp_f4_huge.nii.gz": "5-D",
    "real/rgb_ct_perfusion.nii.gz": "RGB",
    "real/rgb_spine_report.nii.gz": "RGB",
    "real/rgba_atlas.nii.gz": "RGBA",
    "real/complex.nii.gz": "complex",
    "real/complex_1x1.nii.gz": "complex",
    "real/2d_brain_slice.nii.gz": "2-D",
    "real/2d_brain_slice_label2035.nii.gz": "2-D",
    "real/broken_short.nii.gz": "promises 11059200 bytes",
    "real/broken_appledouble.nii.gz": "AppleDouble",
    "real/image.mha": "MetaImage",
    "real/FLAIR.nrrd": "NRRD",
    "real/surface_163842x1x1x1.nii.gz": "surface",
    "real/cifti.dtseries.nii": "CIFTI",
    "derived/truncated60.nii.gz": "cut short",
    "derived/truncated_crc.nii.gz": "cut short",
    "derived/corrupt_middle.nii.gz": "corrupt",
    "derived/header_only.nii": "promises 62475 bytes",
    "derived/truncated.nii": "promises 62475 bytes",
    "derived/zero_bytes.nii.gz": "empty",
    "derived/lfs_pointer.nii.gz": "Git LFS",
    "derived/text.nii.gz": "not a NIfTI",
    "derived/dim0_is_9.nii": "dim[0]",
    "derived/bad_datatype.nii": "77",
    "derived/dim_lies.nii": "30000",
}
NOTED = {
    "derived/gz_but_named.nii": "does not end in .gz",
    "derived/not_gz_but_named.nii.gz": "not compressed",
    "derived/trailing_garbage.nii.gz": "after the end of the gzip stream",
    "derived/no_affine.nii.gz": "nothing about orientation",
    "real/bigendian_minimal_sagittal.nii.gz": "nothing about orientation",
    "derived/qform_ne_sform.nii.gz": "qform and sform disagree",
    "real/scaled_ct_shear_u1.nii.gz": "sheared",
    "real/oblique53_S0.nii.gz": "sheared",
}
NONFINITE = {"real/nan_resampled_f4be.nii", "real/nan_fmri_tsnr.nii.gz", "derived/nan_inf.nii.gz"}
UNREADABLE_BY_NAME = {"derived/gz_but_named.nii", "derived/not_gz_but_named.nii.gz"}  # nibabel goes by the suffix


def by_nibabel(path: Path) -> nib.Nifti1Image:
    blob = path.read_bytes()
    if path.name in ("gz_but_named.nii", "not_gz_but_named.nii.gz"):
        return nib.Nifti1Image.from_bytes(gzip.decompress(blob) if blob[:2] == b"\x1f\x8b" else blob)
    return nib.load(path)


@pytest.mark.real
def test_every_odd_file_is_read_right_or_refused(data_root):
    folder = data_root / "odd_files"
    names = [row["file"] for row in csv.DictReader((folder / "manifest.csv").open())]
    assert len(names) > 70
    for name in (n for n in names if "*" not in n):
        path = folder / name
        if name in REFUSED:
            with pytest.raises(UserError) as error:
                nifti.read(path)
            assert str(path) in str(error.value), name
            assert REFUSED[name] in str(error.value), (name, str(error.value))
            continue
        volume = nifti.read(path)
        reference = by_nibabel(path)
        np.testing.assert_array_equal(volume.affine, reference.affine, err_msg=name)
        expected = np.asanyarray(reference.dataobj)
        expected = expected[..., 0] if expected.ndim == 4 and expected.shape[3] == 1 else expected
        assert volume.data.dtype.isnative
        if volume.data.dtype == expected.dtype.newbyteorder("="):
            np.testing.assert_array_equal(volume.data, expected, err_msg=name)
        else:  # scaled to float32 where nibabel gives float64: correctly rounded
            np.testing.assert_array_equal(volume.data, expected.astype(np.float32), err_msg=name)
        assert volume.nonfinite == np.count_nonzero(~np.isfinite(expected)), name
        assert bool(volume.nonfinite) == (name in NONFINITE), name
        if name in NOTED:
            assert any(NOTED[name] in note for note in volume.notes), (name, volume.notes)
        else:
            assert not volume.notes, (name, volume.notes)
        assert nifti.read_grid(path)[0] == volume.data.shape, name


@pytest.mark.real
def test_every_readable_odd_file_can_be_written_back(data_root, tmp_path):
    """A prediction for it has its shape and, bit for bit, its affine; no other header field is needed to see that."""
    folder = data_root / "odd_files"
    for row in csv.DictReader((folder / "manifest.csv").open()):
        if row["file"] in REFUSED or "*" in row["file"] or row["file"] in UNREADABLE_BY_NAME:
            continue
        source = nifti.read(folder / row["file"])
        if source.data.size > 2e6:
            continue
        mask = np.zeros(source.shape, np.int64)
        mask[::2] = 3
        nifti.write(tmp_path / "out.nii.gz", mask, source)
        back, original = nib.load(tmp_path / "out.nii.gz"), nib.load(folder / row["file"])
        np.testing.assert_array_equal(back.affine, original.affine, err_msg=row["file"])
        assert back.get_data_dtype() == np.uint8
        np.testing.assert_array_equal(np.asanyarray(back.dataobj), mask)
        assert int(back.header["sform_code"]) == int(original.header["sform_code"])
        assert int(back.header["qform_code"]) == int(original.header["qform_code"])
        np.testing.assert_array_equal(nifti.read(tmp_path / "out.nii.gz").affine, source.affine)


# ---------------------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("klass", [nib.Nifti1Image, nib.Nifti2Image])
@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int16, np.uint16, np.int32, np.float32, np.float64])
def test_reads_what_nibabel_wrote(tmp_path, suffix, klass, dtype):
    data = voxels(dtype, (5, 6, 7, 2))
    path = save(tmp_path / f"a{suffix}", data, OBLIQUE, klass)
    volume = nifti.read(path)
    np.testing.assert_array_equal(volume.data, data)
    assert volume.data.dtype == dtype
    np.testing.assert_array_equal(volume.affine, nib.load(path).affine)
    assert volume.source == path


def test_pair_by_either_name_and_half_of_it(tmp_path):
    data = voxels()
    nib.save(nib.Nifti1Pair(data, OBLIQUE), tmp_path / "a.hdr")
    for name in ("a.hdr", "a.img"):
        np.testing.assert_array_equal(nifti.read(tmp_path / name).data, data)
    (tmp_path / "a.img").unlink()
    with pytest.raises(UserError, match=r"a\.hdr: half of a NIfTI pair; a\.img"):
        nifti.read(tmp_path / "a.hdr")


def test_analyze_without_orientation_is_refused(tmp_path):
    nib.save(nib.AnalyzeImage(voxels(), np.eye(4)), tmp_path / "a.hdr")
    with pytest.raises(UserError, match="does not say which side is left"):
        nifti.read(tmp_path / "a.img")


def test_scaling_is_rounded_once(tmp_path):
    path = save(tmp_path / "a.nii", voxels(np.uint8))
    blob = bytearray(path.read_bytes())
    blob[112:120] = struct.pack("<ff", 0.1, -1024)
    path.write_bytes(blob)
    expected = np.asanyarray(nib.load(path).dataobj)
    got = nifti.read(path).data
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, expected.astype(np.float32))


def test_nan_slope_means_no_scaling_and_inf_is_refused(tmp_path):
    path = save(tmp_path / "a.nii", voxels())
    blob = bytearray(path.read_bytes())
    blob[112:120] = struct.pack("<ff", np.nan, np.nan)
    path.write_bytes(blob)
    assert nifti.read(path).data.dtype == np.int16
    for slope, inter in ((1, np.inf), (np.inf, 0)):
        blob[112:120] = struct.pack("<ff", slope, inter)
        path.write_bytes(blob)
        with pytest.raises(UserError, match="scaling"):
            nifti.read(path)


def test_missing_file_folder_and_foreign_files(tmp_path):
    with pytest.raises(UserError, match=r"none\.nii: no such file"):
        nifti.read(tmp_path / "none.nii")
    with pytest.raises(UserError, match="folder"):
        nifti.read(tmp_path)
    for start, words in ((b"\0" * 128 + b"DICM", "DICOM"), (b"PK\x03\x04", "zip"), (b"<!DOCTYPE html>", "web page")):
        (tmp_path / "x.nii").write_bytes(start + b"\0" * 400)
        with pytest.raises(UserError, match=words):
            nifti.read(tmp_path / "x.nii")


def test_header_that_promises_terabytes_is_refused_at_once(tmp_path):
    for suffix in (".nii", ".nii.gz"):
        path = save(tmp_path / "a.nii", voxels())
        blob = bytearray(path.read_bytes())
        blob[40:56] = struct.pack("<8h", 3, 30000, 30000, 30000, 1, 1, 1, 1)
        path = tmp_path / f"b{suffix}"
        path.write_bytes(gzip.compress(bytes(blob)) if suffix.endswith("gz") else bytes(blob))
        for function in (nifti.read, nifti.read_grid):
            with pytest.raises(UserError, match="promises 54000000000000 bytes"):
                function(path)


@pytest.mark.parametrize("offset", [1e30, np.nan, -5.0, 400.5, 0.0])  # 0: the header itself would be taken for voxels
def test_lying_vox_offset(tmp_path, offset):
    path = save(tmp_path / "a.nii", voxels())
    blob = bytearray(path.read_bytes())
    blob[108:112] = struct.pack("<f", offset)
    path.write_bytes(blob)
    with pytest.raises(UserError, match=r"a\.nii"):
        nifti.read(path)


@pytest.mark.parametrize("dims", [(3, 0, 6, 7), (3, -3, 6, 7), (0, 5, 6, 7)])
def test_impossible_dimensions(tmp_path, dims):
    path = save(tmp_path / "a.nii", voxels())
    blob = bytearray(path.read_bytes())
    blob[40:48] = struct.pack("<4h", *dims)
    path.write_bytes(blob)
    with pytest.raises(UserError, match=r"a\.nii"):
        nifti.read(path)


def test_every_cut_and_many_flipped_bytes_are_noticed(tmp_path):
    """No damage of a gzip file passes for an image: it is refused, or what is read is the original."""
    data = voxels(np.uint8)
    good = save(tmp_path / "a.nii.gz", data).read_bytes()
    path = tmp_path / "b.nii.gz"
    for cut in range(0, len(good), 7):
        path.write_bytes(good[:cut])
        with pytest.raises(UserError):
            nifti.read(path)
    for at in np.random.default_rng(0).integers(0, len(good), 100):
        bad = bytearray(good)
        bad[at] ^= 0x55
        path.write_bytes(bad)
        try:
            got = nifti.read(path).data
        except UserError:
            continue
        np.testing.assert_array_equal(got, data)  # a byte of the gzip header that means nothing (time, name...)


def test_gzip_of_several_members_and_zero_padding(tmp_path):
    data = voxels(np.uint8)
    plain = save(tmp_path / "a.nii", data).read_bytes()
    (tmp_path / "b.nii.gz").write_bytes(gzip.compress(plain[:400]) + gzip.compress(plain[400:]) + bytes(70_000))
    volume = nifti.read(tmp_path / "b.nii.gz")
    np.testing.assert_array_equal(volume.data, data)
    assert volume.notes == ()
    (tmp_path / "b.nii.gz").write_bytes(gzip.compress(plain) + gzip.compress(plain)[:-3])
    with pytest.raises(UserError, match="cut short"):  # a damaged second member
        nifti.read(tmp_path / "b.nii.gz")


def test_bytes_after_the_last_voxel_are_noted_once_for_many_files(tmp_path, capsys):
    plain = save(tmp_path / "a.nii", voxels(np.uint8)).read_bytes()
    for i in range(3):
        (tmp_path / f"b{i}.nii").write_bytes(plain + b"x" * (10 + i))
        assert nifti.read(tmp_path / f"b{i}.nii").notes == (f"{10 + i} bytes after the last voxel are ignored",)
    assert capsys.readouterr().err.count("after the last voxel") == 1


def test_zero_pixdim_is_harmless_beside_an_sform_and_fatal_alone(tmp_path):
    image = nib.Nifti1Image(voxels(), OBLIQUE)
    nib.save(image, tmp_path / "a.nii")
    blob = bytearray((tmp_path / "a.nii").read_bytes())
    blob[88:92] = struct.pack("<f", 0.0)  # pixdim[3]
    (tmp_path / "b.nii").write_bytes(blob)
    volume = nifti.read(tmp_path / "b.nii")
    np.testing.assert_array_equal(volume.affine, nib.load(tmp_path / "a.nii").affine)
    assert any("spacing" in note for note in volume.notes)
    blob[252:256] = struct.pack("<hh", 0, 0)  # neither qform nor sform
    (tmp_path / "c.nii").write_bytes(blob)
    with pytest.raises(UserError, match=r"c\.nii: a voxel spacing in the header \(pixdim\) is 0"):
        nifti.read(tmp_path / "c.nii")


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_a_form_of_an_unknown_code_is_there_all_the_same(tmp_path, suffix):
    # Above 0 means that the form holds; without it left and right would silently be the standard's default.
    image = nib.Nifti1Image(voxels(), np.diag([2, 3, 4, 1.0]))
    nib.save(image, tmp_path / "a.nii")
    blob = bytearray((tmp_path / "a.nii").read_bytes())
    blob[252:256] = struct.pack("<2h", 0, 9)
    path = tmp_path / f"b{suffix}"
    path.write_bytes(gzip.compress(bytes(blob)) if suffix.endswith("gz") else bytes(blob))
    volume = nifti.read(path)
    np.testing.assert_array_equal(volume.affine, image.affine)
    assert "sform_code 9 is none the standard knows" in volume.notes[0]
    np.testing.assert_array_equal(nifti.read_grid(path)[1], image.affine)
    nifti.write(tmp_path / "c.nii", voxels(), volume)
    np.testing.assert_array_equal(nib.load(tmp_path / "c.nii").affine, image.affine)


def test_a_negative_pixdim_alone_is_told(tmp_path):
    image = nib.Nifti1Image(voxels(), None)
    image.set_qform(np.diag([2, 3, 4, 1.0]), 1)
    image.set_sform(None, 0)
    nib.save(image, tmp_path / "a.nii")
    blob = bytearray((tmp_path / "a.nii").read_bytes())
    blob[80:84] = struct.pack("<f", -2)
    (tmp_path / "a.nii").write_bytes(blob)
    volume = nifti.read(tmp_path / "a.nii")
    np.testing.assert_allclose(volume.affine, np.diag([2, 3, 4, 1.0]), atol=1e-6)
    assert any("(pixdim) is negative" in note for note in volume.notes)


@pytest.mark.parametrize(
    ("unit", "edge", "words"),
    [(1, 2.0, "metres; they are taken"), (3, 25.0, "micrometres; they are taken"), (1, 0.002, ""), (3, 500.0, "")],
)
def test_another_unit_is_told_and_refused_where_it_cannot_be_a_mistake(tmp_path, unit, edge, words):
    blob = bytearray(save(tmp_path / "a.nii", voxels(), np.diag([edge, edge, edge, 1])).read_bytes())
    blob[123] = unit
    (tmp_path / "a.nii").write_bytes(blob)
    if words:
        assert words in nifti.read(tmp_path / "a.nii").notes[0]
        return
    for function in (nifti.read, nifti.read_grid):
        with pytest.raises(UserError, match=r"a\.nii: the header gives lengths in .*metres, and voxels of .* x"):
            function(tmp_path / "a.nii")


def test_a_sheared_grid_says_so_and_its_volumes_are_exact(tmp_path):
    affine = np.diag([1, 1, 5, 1.0])
    affine[1, 2] = 5 * np.tan(np.deg2rad(20))  # gantry tilt
    volume = nifti.read(save(tmp_path / "a.nii", voxels(), affine))
    (note,) = volume.notes
    assert "the affine is sheared" in note
    assert volume.voxel_volume == pytest.approx(5)
    assert np.prod(volume.spacing) == pytest.approx(5 / np.cos(np.deg2rad(20)))


@pytest.mark.parametrize("function", [nifti.read, nifti.read_grid])
@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ((1, 1, 0, 0, 1, 1, 0, 0, 0, 0, 1, 0), "the affine is singular"),
        ((0,) * 12, "the voxel spacing along x, y, z is 0"),
        ((np.nan,) * 12, "the affine has values that are not finite"),
    ],
)
def test_singular_sform(tmp_path, rows, words, function):
    path = save(tmp_path / "a.nii", voxels())
    blob = bytearray(path.read_bytes())
    blob[280:328] = struct.pack("<12f", *rows)
    path.write_bytes(blob)
    with pytest.raises(UserError, match=rf"a\.nii: {words}"):
        function(path)


@pytest.mark.parametrize("signs", [(1, 1, 1), (-1, -1, 1)])
def test_an_identity_that_pixdim_contradicts_is_refused(tmp_path, signs):
    image = nib.Nifti1Image(voxels(), np.diag([*signs, 1.0]))
    image.header.set_zooms((0.5, 0.5, 3))
    nib.save(image, tmp_path / "a.nii")
    for function in (nifti.read, nifti.read_grid):
        with pytest.raises(UserError, match=r"a\.nii: .*voxels of 1 x 1 x 1 mm, .* pixdim says 0\.5 x 0\.5 x 3; "):
            function(tmp_path / "a.nii")


def test_an_sform_of_another_size_than_pixdim_is_told(tmp_path):
    image = nib.Nifti1Image(voxels(), np.diag([2, 3, 4, 1.0]))
    edges = np.array(image.header.get_zooms())
    image.header.set_zooms(edges * (1, 1, 2))
    nib.save(image, tmp_path / "a.nii")
    volume = nifti.read(tmp_path / "a.nii")
    np.testing.assert_allclose(volume.spacing, edges, rtol=1e-6)
    (note,) = volume.notes
    assert note.startswith("the sform makes voxels of 2 x 3 x 4 mm, pixdim says 2 x 3 x 8; the sform is used")
    # What agrees, or nearly, is worth no line; nor is a qform's pixdim, which is compared as a whole.
    nib.save(nib.Nifti1Image(voxels(), np.diag([2, 3, 4, 1.0])), tmp_path / "b.nii")
    image.header.set_zooms(edges * (1, 1, 1.004))
    nib.save(image, tmp_path / "c.nii")
    assert nifti.read(tmp_path / "b.nii").notes == nifti.read(tmp_path / "c.nii").notes == ()
    image.set_qform(np.diag([1, 2, 3, 1.0]), 1)
    nib.save(image, tmp_path / "d.nii")
    (note,) = nifti.read(tmp_path / "d.nii").notes
    assert note.startswith("qform and sform disagree")


def test_unreadable_file_is_a_user_error(tmp_path, monkeypatch):
    path = save(tmp_path / "a.nii", voxels())

    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(UserError, match=r"a\.nii: cannot be read: Permission denied"):
        nifti.read(path)


# ----------------------------------------------------------------------------------------------------- labels


def test_label_in_the_smallest_type(tmp_path):
    data = voxels(np.float64).clip(0, 3)
    label = nifti.read_label(save(tmp_path / "a.nii.gz", data), values=[1, 2, 3])
    assert label.data.dtype == np.uint8
    np.testing.assert_array_equal(label.data, data)
    data[0, 0, 0] = 2035
    assert nifti.read_label(save(tmp_path / "a.nii.gz", data)).data.dtype == np.uint16
    data[0, 0, 0] = 100_000
    label = nifti.read_label(save(tmp_path / "a.nii.gz", data), values=[1, 2, 3, 100_000])
    assert label.data.max() == 100_000


def test_large_labels_survive_a_float32_slope(tmp_path):
    # Stored as 7 times the label, slope 1/7: as a float32 that leaves 100001 off by more than a thousandth.
    stored = np.zeros((4, 4, 4), np.int32)
    stored[0, 0, :3] = 7, 7 * 12175, 7 * 100_001
    blob = bytearray(save(tmp_path / "a.nii", stored).read_bytes())
    blob[112:116] = struct.pack("<f", 1 / 7)
    (tmp_path / "a.nii").write_bytes(blob)
    assert np.abs(nifti.read(tmp_path / "a.nii").data[0, 0, 2] - 100_001) > 1e-3
    label = nifti.read_label(tmp_path / "a.nii", values=(1, 12175, 100_001))
    np.testing.assert_array_equal(label.data, stored // 7)


def test_undeclared_labels_are_listed_with_their_counts(tmp_path):
    data = np.zeros((4, 4, 4), np.int32)
    data[0, 0, :3], data[1, 1, 1], data[2, 2, 2] = 9, 4, 1
    path = save(tmp_path / "a.nii.gz", data)
    with pytest.raises(UserError, match=r"a\.nii\.gz: undeclared labels 4 \(1 voxels\), 9 \(3 voxels\); .* 0, 1, 2"):
        nifti.read_label(path, values=(1, 2))
    data[3, 3, 3] = 70_000
    with pytest.raises(UserError, match=r"70000 \(1 voxels\)"):
        nifti.read_label(save(tmp_path / "a.nii.gz", data), values=(1, 4, 9))


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (-1.0, r"negative labels -1 \(2 voxels\)"),
        (0.4, r"2 label values are not integers \(0\.4\)"),
        (np.nan, "2 label"),
    ],
)
def test_bad_label_values(tmp_path, value, words):
    data = np.ones((4, 4, 4), np.float32)
    data[0, 0, :2] = value
    with pytest.raises(UserError, match=words) as error:
        nifti.read_label(save(tmp_path / "bad_label.nii.gz", data))
    assert "bad_label.nii.gz" in str(error.value)


def test_channels_are_no_label_map(tmp_path):
    with pytest.raises(UserError, match="3 channels"):
        nifti.read_label(save(tmp_path / "a.nii.gz", voxels(shape=(4, 5, 6, 3))))


def test_label_must_share_the_image_grid(tmp_path):
    image = nifti.read(save(tmp_path / "image.nii.gz", voxels(), OBLIQUE))
    with pytest.raises(UserError, match="shape") as error:
        nifti.read_label(save(tmp_path / "label.nii.gz", voxels(shape=(5, 6, 8)), OBLIQUE), image)
    assert "image.nii.gz" in str(error.value)
    assert "label.nii.gz" in str(error.value)
    with pytest.raises(UserError, match="were axes swapped"):
        nifti.read_label(save(tmp_path / "label.nii.gz", voxels(shape=(image.shape[::-1])), OBLIQUE), image)
    flipped = OBLIQUE @ np.diag([-1, 1, 1, 1.0])
    with pytest.raises(UserError, match="another place in space"):
        nifti.read_label(save(tmp_path / "label.nii.gz", voxels(), flipped), image)


@pytest.mark.real
def test_real_labels(data_root):
    odd = data_root / "odd_files"
    derived, real = odd / "derived", odd / "real"
    with pytest.raises(UserError, match=r"label_extra_class9.*undeclared label 9"):
        nifti.read_label(derived / "label_extra_class9.nii.gz", values=(1, 2))
    # Meant to hold -1, it holds 255: the file was made in uint8.
    with pytest.raises(UserError, match=r"label_neg.*undeclared label 255 \(1624 voxels\)"):
        nifti.read_label(derived / "label_neg.nii.gz", values=(1, 2))
    assert set(np.unique(nifti.read_label(derived / "label_float_1.0000001.nii.gz").data)) <= {0, 1, 2}
    assert not nifti.read_label(real / "empty_label.nii.gz", values=(1,)).data.any()
    label = nifti.read_label(
        real / "oblique_flair_lesion_label.nii.gz", nifti.read(real / "oblique_flair_lesion_image.nii.gz"), (1, 2, 3)
    )
    assert label.data.max() == 3
    with pytest.raises(UserError, match=r"4d_onehot_label_f8.*3 channels\. Merge them into one map"):
        nifti.read_label(real / "4d_onehot_label_f8.nii.gz")
    # The mask whose ones read as 0.99999997.
    brain = data_root / "brats_deepmedic" / "brats_2013_pat0003_1" / "brainmask.nii.gz"
    mask = nifti.read_label(brain, values=(1,)).data
    assert (mask == 1).sum() == np.count_nonzero(nib.load(brain).get_fdata() > 0.5) > 1e6


@pytest.mark.real
def test_real_mismatched_pairs(data_root):
    real = data_root / "odd_files" / "real"
    image = nifti.read(real / "mismatch_image.nii.gz")
    with pytest.raises(UserError, match="another place in space") as error:
        nifti.read_label(real / "mismatch_label.nii.gz", image)
    assert all(w in str(error.value) for w in ("mismatch_label", "mismatch_image", "RAS", "LPS"))
    with pytest.raises(UserError, match=r"\(233, 167, 191\).*\(240, 240, 48\)"):
        nifti.read_label(real / "mismatch_shape_label.nii.gz", image)
    brats = nifti.read(data_root / "brats_4mod" / "BraTS-GLI-00001-000" / "t1c.nii.gz")
    with pytest.raises(UserError, match="RAS.*against LPS"):
        nifti.read_label(real / "mismatch_orient_label.nii.gz", brats)


# ---------------------------------------------------------------------------------------------------- writing


@pytest.mark.parametrize(
    ("array", "dtype"),
    [
        (np.ones((2, 3, 4), bool), "uint8"),
        (np.full((2, 3, 4), 255, np.int64), "uint8"),
        (np.full((2, 3, 4), -1, np.int64), "int8"),
        (np.full((2, 3, 4), 300, np.int64), "int16"),
        (np.full((2, 3, 4), 40_000, np.int64), "uint16"),
        (np.full((2, 3, 4), 70_000, np.int64), "int32"),
        (np.full((2, 3, 4), 2**40, np.int64), "int64"),
        (np.full((2, 3, 4), 0.1, np.float16), "float32"),
        (np.full((2, 3, 4), 0.1, np.float32), "float32"),
        (np.full((2, 3, 4), 0.1, np.float64), "float64"),
    ],
)
def test_written_dtype_is_lossless(tmp_path, array, dtype):
    nifti.write(tmp_path / "a.nii", array, Volume(np.zeros((2, 3, 4)), np.eye(4)))
    back = nib.load(tmp_path / "a.nii")
    assert back.get_data_dtype() == dtype
    np.testing.assert_array_equal(np.asanyarray(back.dataobj), array)


@pytest.mark.parametrize("klass", [nib.Nifti1Image, nib.Nifti2Image, nib.Nifti1Pair])
def test_written_file_keeps_the_source_header(tmp_path, klass):
    image = klass(voxels(), OBLIQUE)
    image.header.set_xyzt_units("mm", "sec")
    image.header["descrip"] = b"scanner 7"
    image.header["cal_max"] = 900
    image.header["intent_code"] = 3
    image.set_sform(OBLIQUE, 4)
    image.set_qform(OBLIQUE, 2)
    source = tmp_path / ("in.hdr" if klass is nib.Nifti1Pair else "in.nii.gz")
    nib.save(image, source)
    volume = nifti.read(source)
    nifti.write(tmp_path / "deep" / "er" / "out.nii.gz", np.ones(volume.shape, np.uint8), volume)
    back = nib.load(tmp_path / "deep" / "er" / "out.nii.gz")
    assert isinstance(back, nib.Nifti2Image if klass is nib.Nifti2Image else nib.Nifti1Image)
    np.testing.assert_array_equal(back.affine, volume.affine)
    header = back.header
    assert header["descrip"].item() == b"scanner 7"
    assert (int(header["qform_code"]), int(header["sform_code"])) == (2, 4)
    assert header.get_xyzt_units() == ("mm", "sec")
    assert (float(header["cal_max"]), int(header["intent_code"])) == (0, 0)
    np.testing.assert_array_equal(back.get_qform(), nib.load(source).get_qform())


def test_channels_and_extensions_survive(tmp_path):
    image = nib.Nifti1Image(voxels(), OBLIQUE)
    image.header.extensions.append(nib.nifti1.Nifti1Extension(6, b"a comment"))
    nib.save(image, tmp_path / "in.nii.gz")
    volume = nifti.read(tmp_path / "in.nii.gz")
    prob = np.random.default_rng(0).random((*volume.shape, 3)).astype(np.float32)
    nifti.write(tmp_path / "out.nii.gz", prob, volume)
    back = nib.load(tmp_path / "out.nii.gz")
    np.testing.assert_array_equal(back.get_fdata(dtype=np.float32), prob)
    assert back.header.extensions[0].get_content() == b"a comment"
    np.testing.assert_array_equal(nifti.read(tmp_path / "out.nii.gz").data, prob)


def test_volume_without_header_or_with_a_new_affine(tmp_path):
    moved = Volume(np.zeros((5, 6, 7)), OBLIQUE.astype(np.float32).astype(np.float64))
    nifti.write(tmp_path / "a.nii.gz", np.zeros((5, 6, 7), np.uint8), moved)
    np.testing.assert_array_equal(nib.load(tmp_path / "a.nii.gz").affine, moved.affine)
    header = nifti.read(save(tmp_path / "b.nii.gz", voxels())).header
    nifti.write(tmp_path / "c.nii.gz", np.zeros((5, 6, 7), np.uint8), Volume(moved.data, moved.affine, None, header))
    np.testing.assert_array_equal(nib.load(tmp_path / "c.nii.gz").affine, moved.affine)


def test_equal_input_gives_equal_bytes_and_an_intact_stream(tmp_path):
    like = Volume(np.zeros((5, 6, 7)), np.eye(4))
    for name in ("a.nii.gz", "other_name.nii.gz"):
        nifti.write(tmp_path / name, voxels(), like)
    assert (tmp_path / "a.nii.gz").read_bytes() == (tmp_path / "other_name.nii.gz").read_bytes()
    assert len(gzip.decompress((tmp_path / "a.nii.gz").read_bytes())) == 352 + 5 * 6 * 7


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_failed_write_leaves_the_old_file_and_no_rest(tmp_path, monkeypatch, name):
    like = Volume(np.zeros((5, 6, 7)), np.eye(4))
    nifti.write(tmp_path / name, voxels(), like)
    before = (tmp_path / name).read_bytes()

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=rf"{name}: cannot be written: No space left on device"):
        nifti.write(tmp_path / name, voxels() + 1, like)
    assert (tmp_path / name).read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_two_writers_of_one_file_do_not_meet(tmp_path, monkeypatch):
    # Two machines: each has its own modules, and both processes have the same number.
    monkeypatch.setattr(os, "getpid", lambda: 7)
    one, two = (importlib.util.module_from_spec(importlib.util.find_spec(nifti.__name__)) for _ in range(2))
    for module in (one, two):
        module.__spec__.loader.exec_module(module)
    path = tmp_path / "a.nii"
    with one._replacing(path) as first:
        first.write(b"first")
        with two._replacing(path) as second:
            second.write(b"second")
        assert path.read_bytes() == b"second"
    assert path.read_bytes() == b"first"
    # Nor does one that meets the other's file take it away.
    monkeypatch.setattr("uuid.uuid4", lambda: uuid.UUID(int=1))
    with nifti._replacing(path) as first:
        first.write(b"third")
        with pytest.raises(UserError, match="cannot be written: File exists"), nifti._replacing(path):
            pass
    assert path.read_bytes() == b"third"
    assert [p.name for p in tmp_path.iterdir()] == ["a.nii"]


@pytest.mark.parametrize(
    ("name", "array", "words"),
    [
        ("a.mha", np.zeros((5, 6, 7)), r"only \.nii and \.nii\.gz"),
        ("a.nii", np.zeros((5, 6, 8)), r"\(5, 6, 8\) on the grid \(5, 6, 7\)"),
        ("a.nii", np.zeros((5, 6, 7), complex), "complex128"),
    ],
)
def test_unwritable(tmp_path, name, array, words):
    with pytest.raises(UserError, match=words):
        nifti.write(tmp_path / name, array, Volume(np.zeros((5, 6, 7)), np.eye(4)))
    assert not list(tmp_path.iterdir())


def test_stored_big_endian_is_written_little_endian_on_the_same_grid(tmp_path):
    image = nib.Nifti1Image(voxels(), OBLIQUE, nib.Nifti1Header(endianness=">"))
    image.set_data_dtype(">i2")
    buffer = io.BytesIO()
    image.to_file_map({"image": nib.FileHolder(fileobj=buffer)})
    (tmp_path / "in.nii").write_bytes(buffer.getvalue())
    volume = nifti.read(tmp_path / "in.nii")
    np.testing.assert_array_equal(volume.data, voxels())
    nifti.write(tmp_path / "out.nii", volume.data, volume)
    assert nib.load(tmp_path / "out.nii").header.endianness == "<"
    np.testing.assert_array_equal(nib.load(tmp_path / "out.nii").affine, volume.affine)


@pytest.mark.parametrize("klass", [nib.Nifti1Image, nib.Nifti2Image])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_no_damage_to_a_header_escapes(tmp_path, klass):
    """Whatever bytes a header has, the file is refused in words, or read as nibabel reads it and written back alike."""
    path = save(tmp_path / "a.nii", voxels(), OBLIQUE, klass)
    good, rng = path.read_bytes(), np.random.default_rng(0)
    length = 352 if klass is nib.Nifti1Image else 544
    read = 0
    for _ in range(300):
        bad = bytearray(good)
        for at in rng.integers(0, length, rng.integers(1, 4)):
            bad[at] = rng.integers(0, 256)
        path.write_bytes(bad)
        try:
            volume = nifti.read(path)
        except UserError:
            continue
        read += 1
        nifti.write(tmp_path / "b.nii", np.zeros(volume.shape, np.uint8), volume)
        expected = nib.load(path)
        if any("none the standard knows" in note for note in volume.notes):  # nibabel drops such a form
            assert {int(volume.header[key]) for key in ("qform_code", "sform_code")} >= {1}
            expected = nib.load(tmp_path / "b.nii")
        np.testing.assert_array_equal(nib.load(tmp_path / "b.nii").affine, expected.affine)
        np.testing.assert_array_equal(volume.affine, expected.affine)
    assert 50 < read < 290  # both happen
