//! What `picture` promises, tested.

use super::*;

fn golden(name: &str) -> Vec<u8> {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/golden/pictures/");
    std::fs::read(format!("{folder}{name}")).unwrap()
}

fn of(name: &str) -> Picture {
    decode(&golden(name)).unwrap().0
}

fn near(a: [u8; 3], b: [u8; 3], by: u8) -> bool {
    a.iter().zip(b).all(|(x, y)| x.abs_diff(y) <= by)
}

fn shows_the_test_picture(p: &Picture, by: u8) {
    assert_eq!((p.width, p.height), (24, 16));
    assert!(near(p.at(2, 1), [255; 3], by), "{:?}", p.at(2, 1));
    assert!(near(p.at(4, 12), [200, 30, 30], by), "{:?}", p.at(4, 12));
    assert!(near(p.at(20, 12), [30, 30, 200], by), "{:?}", p.at(20, 12));
}

#[test]
fn every_kind_of_file_shows_the_same_picture() {
    let exact = ["plain.png", "plain.webp", "deep.png", "profile.png"];
    for name in exact.iter().chain(&["animated.webp", "animated.png"]) {
        shows_the_test_picture(&of(name), 0);
    }
    shows_the_test_picture(
        &of("alpha.png").on([200, 30, 30]).cropped(0, 0, 24, 16),
        255,
    );
    shows_the_test_picture(&of("plain.jpg"), 6);
    shows_the_test_picture(&of("turned.jpg"), 6);
    shows_the_test_picture(&of("cmyk.jpg"), 24);
    shows_the_test_picture(&of("palette.png"), 60);
}

#[test]
fn grey_files_become_three_equal_channels() {
    for name in ["grey.png", "grey.jpg"] {
        let p = of(name);
        assert!(p.rgb.chunks_exact(3).all(|c| c[0] == c[1] && c[1] == c[2]));
        assert!(p.at(4, 12)[0].abs_diff(luma(&[200, 30, 30])) <= 3);
    }
}

#[test]
fn alpha_is_kept_and_an_opaque_channel_is_dropped() {
    let p = of("alpha.png");
    let alpha = p.alpha.as_ref().unwrap();
    assert_eq!([alpha[0], alpha[7 * 24], alpha[8 * 24]], [255, 128, 0]);
    assert_eq!(p.on([9; 3]).at(20, 12), [9; 3]);
    let again = decode(&p.to_png(&[]).unwrap()).unwrap().0;
    assert_eq!(again, p);
    assert_eq!(of("plain.png").alpha, None);
}

#[test]
fn an_rgb_profile_survives_being_written() {
    let p = of("profile.png");
    assert!(p.icc.is_some());
    let again = decode(&p.to_png(&[]).unwrap()).unwrap().0;
    assert_eq!(again.icc, p.icc);
}

#[test]
fn text_written_into_a_png_is_read_back_and_other_decoders_still_read_the_picture() {
    let p = of("plain.png");
    let long = "é".repeat(5000);
    let file = p
        .to_png(&[("simpatico", "{\"a\":1}"), (chunks::XMP, &long)])
        .unwrap();
    assert_eq!(chunks::text_of(&file, "simpatico").unwrap(), "{\"a\":1}");
    assert_eq!(chunks::text_of(&file, chunks::XMP).unwrap(), long);
    assert_eq!(chunks::text_of(&file, "simpatic"), None);
    assert_eq!(decode(&file).unwrap().0, p);
    for cut in 0..file.len() {
        chunks::text_of(&file[..cut], chunks::XMP);
    }
}

/// A PNG header for any size, with no data behind it.
fn png_header(width: u32, height: u32) -> Vec<u8> {
    let mut ihdr = b"IHDR".to_vec();
    ihdr.extend(width.to_be_bytes());
    ihdr.extend(height.to_be_bytes());
    ihdr.extend([8, 2, 0, 0, 0]);
    let mut crc = flate2::Crc::new();
    crc.update(&ihdr);
    let mut file = vec![
        0x89, b'P', b'N', b'G', b'\r', b'\n', 0x1a, b'\n', 0, 0, 0, 13,
    ];
    file.extend(&ihdr);
    file.extend(crc.sum().to_be_bytes());
    file
}

#[test]
fn a_twenty_thousand_pixel_header_is_refused_by_its_size() {
    let mut file = png_header(20_000, 20_000);
    // An empty data chunk: the sizes are looked at first, so what follows does not matter.
    file.extend([0, 0, 0, 0]);
    file.extend(b"IDAT");
    file.extend([0x35, 0xaf, 0x06, 0x1e]);
    let problem = decode(&file).unwrap_err();
    assert_eq!(problem, PictureProblem::TooLarge(20_000, 20_000));
}

#[test]
fn a_bomb_within_the_side_limit_is_refused_by_its_pixels() {
    use std::io::Write as _;
    let begin = std::time::Instant::now();
    let mut file = png_header(8_192, 8_192);
    let mut zeros = flate2::write::ZlibEncoder::new(Vec::new(), flate2::Compression::best());
    zeros.write_all(&vec![0; 8_192 * 3 * 512]).unwrap();
    let zeros = zeros.finish().unwrap();
    let mut crc = flate2::Crc::new();
    crc.update(b"IDAT");
    crc.update(&zeros);
    file.extend((zeros.len() as u32).to_be_bytes());
    file.extend(b"IDAT");
    file.extend(zeros);
    file.extend(crc.sum().to_be_bytes());
    assert_eq!(
        decode(&file).unwrap_err(),
        PictureProblem::TooLarge(8_192, 8_192)
    );
    assert!(begin.elapsed().as_secs() < 5);
}

#[test]
fn what_is_no_picture_is_called_what_it_looks_like() {
    let cases: [(&[u8], &str); 4] = [
        (b"dear diary, today", "text"),
        (b"", "an empty file"),
        (b"GIF89a\x01\x00\x01\x00", "a GIF"),
        (b"%PDF-1.7", "a PDF"),
    ];
    for (bytes, word) in cases {
        assert_eq!(
            decode(bytes).unwrap_err(),
            PictureProblem::UnknownFormat(word)
        );
    }
}

#[test]
fn a_file_cut_anywhere_is_an_error_and_never_a_panic() {
    for name in [
        "plain.png",
        "plain.jpg",
        "plain.webp",
        "turned.jpg",
        "animated.webp",
    ] {
        let whole = golden(name);
        for cut in 0..whole.len() {
            // Behind the picture's own data a PNG or WebP may lose its tail unnoticed.
            match decode(&whole[..cut]) {
                Ok((p, _)) => assert_eq!(p.rgb, of(name).rgb, "{name} cut at {cut}"),
                Err(problem) => assert!(!problem.to_string().is_empty()),
            }
        }
        assert!(decode(&whole[..whole.len() / 2]).is_err(), "{name}");
    }
}

#[test]
fn a_file_with_any_byte_changed_never_panics() {
    for name in ["plain.png", "cmyk.jpg", "plain.webp", "animated.png"] {
        let whole = golden(name);
        for at in 0..whole.len() {
            let mut bytes = whole.clone();
            bytes[at] ^= 0x5b;
            decode(&bytes).ok();
        }
    }
}

#[test]
fn more_bytes_than_the_limit_are_not_even_looked_at() {
    let bytes = vec![0; MAX_BYTES as usize + 1];
    assert_eq!(
        decode(&bytes).unwrap_err(),
        PictureProblem::TooManyBytes(MAX_BYTES + 1)
    );
}

#[test]
fn one_pixel_is_a_picture() {
    let p = Picture::filled(1, 1, [7, 8, 9]);
    let frame = Frame::plan((1, 1), 128, 16, Fit::Square);
    assert_eq!(frame.to_model(&p).at(64, 64), [7, 8, 9]);
    assert_eq!(frame.from_model(&frame.to_model(&p)), p);
}

#[test]
fn frames_keep_the_aspect_and_give_multiples() {
    for (output, fit) in [
        ((768, 512), Fit::Aspect),
        ((100, 31), Fit::Square),
        ((8_000, 3), Fit::Aspect),
        ((17, 1_023), Fit::Aspect),
        ((512, 512), Fit::Square),
    ] {
        let frame = Frame::plan(output, 128, 16, fit);
        let (mw, mh) = frame.model;
        assert_eq!((mw % 16, mh % 16), (0, 0));
        assert!(u64::from(mw) * u64::from(mh) <= 2 * 128 * 128);
        let (x, y, w, h) = frame.inner;
        assert!(x + w <= mw && y + h <= mh && w > 0 && h > 0);
        let back = frame.from_model(&Picture::filled(mw, mh, [1, 2, 3]));
        assert_eq!((back.width, back.height), output);
    }
}

#[test]
fn a_picture_scaled_down_and_back_is_nearly_itself() {
    let rgb = (0..96 * 64).flat_map(|i| {
        let (x, y) = (i % 96, i / 96);
        [(x * 2) as u8, (y * 3) as u8, (x + y) as u8]
    });
    let p = Picture::from_rgb(96, 64, rgb.collect());
    let frame = Frame::plan((96, 64), 64, 8, Fit::Square);
    let back = frame.from_model(&frame.to_model(&p));
    let worst = p
        .rgb
        .iter()
        .zip(&back.rgb)
        .map(|(a, b)| a.abs_diff(*b))
        .max();
    assert!(worst.unwrap() <= 4, "{worst:?}");
}

#[test]
fn outside_the_mask_every_byte_is_the_sources() {
    let source = of("plain.png");
    let edit = Picture::filled(24, 16, [1, 200, 1]);
    let mut mask = Mask {
        width: 24,
        height: 16,
        values: vec![0; 24 * 16],
    };
    for y in 4..14 {
        for x in 6..20 {
            mask.values[y * 24 + x] = 255;
        }
    }
    let soft = mask.softened(2);
    let out = soft.blend(&source, &edit);
    for (i, share) in mask.values.iter().enumerate() {
        let (x, y) = (i as u32 % 24, i as u32 / 24);
        if *share == 0 {
            assert_eq!(out.at(x, y), source.at(x, y));
        }
    }
    assert_eq!(out.at(13, 9), [1, 200, 1]);
    assert_eq!(mask.blend(&source, &edit).at(6, 4), [1, 200, 1]);
    // Over two pixels, in thirds.
    let row: Vec<u8> = (5..11).map(|x| soft.values[9 * 24 + x]).collect();
    assert_eq!(row, [0, 85, 170, 255, 255, 255]);
    assert_eq!(soft.values[4 * 24 + 6], 85);
    // A part thinner than the edge is wide changes in part, and a wider edge costs no more.
    for width in [8, 4_000_000_000] {
        let soft = mask.softened(width);
        let highest = soft.values.iter().max().copied();
        assert!(highest > Some(0) || width > 1000, "{width}: {highest:?}");
        assert!(soft.values.iter().zip(&mask.values).all(|(s, m)| s <= m));
    }
    assert_eq!(mask.softened_until_2(8).values, vec![0; 24 * 16]);
    // Grey stays grey inside.
    let grey = Mask {
        width: 3,
        height: 1,
        values: vec![90, 200, 90],
    };
    assert_eq!(grey.softened(1).values, [90, 200, 90]);
}

#[test]
fn a_mask_for_another_picture_is_refused_with_both_sizes() {
    let mask = Mask::from_picture(&Picture::filled(4, 4, [255; 3]));
    let said = mask.check(24, 16).unwrap_err().to_string();
    assert!(said.contains("24 x 16") && said.contains("4 x 4"), "{said}");
}

#[test]
fn tensors_go_there_and_back_and_refuse_not_a_number() {
    let p = of("plain.png");
    let t = p.to_tensor(&Device::Cpu).unwrap();
    assert_eq!(t.dims(), [1, 3, 16, 24]);
    assert_eq!(Picture::from_tensor(&t).unwrap(), std::slice::from_ref(&p));
    let bad = (t * f64::NAN).unwrap();
    let said = Picture::from_tensor(&bad).unwrap_err().to_string();
    assert!(said.contains("weights"), "{said}");
}

#[test]
fn a_file_is_written_whole_or_not_at_all() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("out.png");
    write_whole(&path, b"one").unwrap();
    write_whole(&path, b"two").unwrap();
    assert_eq!(std::fs::read(&path).unwrap(), b"two");
    assert!(write_whole(&folder.path().join("no/such/out.png"), b"x").is_err());
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
}

#[test]
fn detail_comes_back_where_nothing_changed_and_nowhere_else() {
    // A fine pattern that four times fewer pixels cannot hold.
    let pixel = |i: u32| {
        let (x, y) = (i % 64, i / 64);
        [if (x + y) % 2 == 0 { 160 } else { 96 }, 128, 128]
    };
    let source = Picture::from_rgb(64, 64, (0..64 * 64).flat_map(pixel).collect());
    let frame = Frame::plan((64, 64), 16, 16, Fit::Square);
    let model = frame.to_model(&source);
    let near = |a: &Picture, b: &Picture, columns: std::ops::Range<u32>| {
        let places = (8..56).flat_map(|y| columns.clone().map(move |x| (x, y)));
        let gaps = places.map(|(x, y)| {
            let (p, q) = (a.at(x, y), b.at(x, y));
            (0..3).map(|c| p[c].abs_diff(q[c])).max().unwrap()
        });
        gaps.max().unwrap()
    };
    // Left alone it is the source again; without detail it is flat.
    assert!(
        near(
            &frame.from_model_with_fine_detail(&model, &source, 1.0),
            &source,
            0..64
        ) <= 2
    );
    let flat = frame.from_model_with_fine_detail(&model, &source, 0.0);
    assert_eq!(flat, frame.from_model(&model));
    assert!(near(&flat, &source, 0..64) > 20);
    // Its right half painted over: no trace of the pattern there, all of it on the left.
    let mut painted = model.clone();
    for (i, pixel) in painted.rgb.chunks_exact_mut(3).enumerate() {
        if i % 16 >= 8 {
            pixel.copy_from_slice(&[10, 200, 30]);
        }
    }
    let out = frame.from_model_with_fine_detail(&painted, &source, 1.0);
    assert!(near(&out, &source, 0..24) <= 2);
    assert!(near(&out, &frame.from_model(&painted), 44..64) <= 1);
    // A picture of the model's own size has nothing to give back.
    let same = Frame::plan((16, 16), 16, 16, Fit::Square);
    let small = Picture::filled(16, 16, [3; 3]);
    let other = Picture::filled(16, 16, [9; 3]);
    assert_eq!(same.from_model_with_fine_detail(&small, &other, 1.0), small);
}
