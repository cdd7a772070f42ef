//! Bad input: one clear message, exit code 1, and nothing left behind.

use std::fs;

use crate::{
    model::{CONTEXT, Tiny},
    world::{DUMP, LEARN, World},
};

/// Evaluation with what is left to say: mask, text and context.
const EVAL: &str = "eval --model model --positions 8 --sequences 1";

#[test]
fn files_that_are_not_there() {
    let world = World::with_mask();
    let missing = "No such file";
    let dump = DUMP.replace("--out dump", "--out d");
    world.fails(&dump.replace("--model model", "--model no.gguf"), &["no.gguf", missing]);
    world.fails(&dump.replace("text.txt", "no.txt"), &["no.txt", missing]);
    world.fails("learn nodump --k-ratio 0.5 --out x.safetensors", &["nodump", "leank dump"]);
    world.fails("inspect no.safetensors", &["no.safetensors", missing]);
    world.fails("plan --mask no.npy", &["no.npy", missing]);
    world.fails("convert no.pth x.npy", &["no.pth", missing]);
    world.fails(
        &format!("{EVAL} --mask no.safetensors --text text.txt"),
        &["no.safetensors", missing],
    );
    world.fails("generate --model model --prompt-file no.txt", &["no.txt", missing]);
    world.fails(
        "generate --model model --prompt a --mask no.safetensors",
        &["no.safetensors", missing],
    );
    world.fails("convert mask.safetensors no/such/folder.npy", &["no/such", "no such folder"]);
    world.fails(&format!("{LEARN} --k-ratio 0.5 --out no/x.npy"), &["no/x.npy", "no such folder"]);
}

#[test]
fn names_whose_extension_is_unknown() {
    let world = World::with_mask();
    world.write("mask.bin", "mask");
    for arguments in [
        "inspect mask.bin".to_owned(),
        "plan --mask mask.bin".to_owned(),
        "convert mask.safetensors x.bin".to_owned(),
        "convert mask.safetensors x".to_owned(),
        format!("{LEARN} --k-ratio 0.5 --out x.bin"),
    ] {
        world.fails(&arguments, &["extension", ".safetensors"]);
    }
    world.fails("convert mask.safetensors x.tsv", &["x.tsv", ".safetensors"]);
    world.fails(&format!("{LEARN} --k-ratio 0.5 --out x.tsv"), &["x.tsv", ".safetensors"]);
    world.write("scales.tsv", "0.1\t0.9\n");
    world.fails("convert scales.tsv x.npy", &["scales.tsv", "--shape"]);
    for arguments in [
        "inspect scales.tsv".to_owned(),
        "plan --mask scales.tsv".to_owned(),
        "generate --model model --prompt a --mask scales.tsv".to_owned(),
        format!("{EVAL} --mask scales.tsv --text text.txt"),
    ] {
        let mend =
            "run `leank convert scales.tsv mask.safetensors --shape LAYERS,KV_HEADS,HEAD_DIM`";
        world.fails(&arguments, &[mend]);
    }
    for option in ["--shape 2,2,16", "--shape 2,2,16 --ratio 0.5", "--shape 2,2,16 --align 4"] {
        let words = ["mask.safetensors is a mask already", "--shape, --ratio and --align"];
        world.fails(&format!("convert mask.safetensors x.npy {option}"), &words);
    }
}

#[test]
fn a_bad_name_is_found_before_anything_is_measured() {
    let world = World::with_dump();
    world.fails(&format!("{LEARN} --k-ratio 0.5 --out x.bin"), &["x.bin"]);
    world.fails(&format!("{LEARN} --k-ratio 0.5 --out x.tsv"), &["x.tsv"]);
    assert!(!world.path("dump/learn").exists());
}

#[test]
fn masks_that_are_damaged() {
    let world = World::with_mask();
    for format in ["safetensors", "pth", "npy"] {
        world.done(&format!("convert mask.safetensors whole.{format}"));
        let bytes = world.read(&format!("whole.{format}"));
        let cut = format!("cut.{format}");
        for len in [0, 7, 30, bytes.len() / 2, bytes.len() - 1] {
            world.write(&cut, &bytes[..len]);
            world.fails(&format!("inspect {cut}"), &[&cut]);
        }
        world.write(&cut, vec![b'x'; 300]);
        world.fails(&format!("inspect {cut}"), &[&cut]);
    }
    // Another format than the name says.
    fs::copy(world.path("whole.npy"), world.path("npy.pth")).unwrap();
    world.fails("inspect npy.pth", &["npy.pth", "NumPy"]);
}

#[test]
fn scaling_factors_in_the_place_of_a_mask() {
    let world = World::new();
    let header = "{'descr': '<f4', 'fortran_order': False, 'shape': (1, 1, 2), }";
    let mut bytes = b"\x93NUMPY\x01\x00\x76\x00".to_vec();
    bytes.extend(format!("{header:<117}\n").as_bytes());
    bytes.extend([0.5f32, 1.0].iter().flat_map(|x| x.to_le_bytes()));
    world.write("factors.npy", bytes);
    let mend = "leank convert factors.tsv mask.safetensors --shape LAYERS,KV_HEADS,HEAD_DIM";
    world.fails("inspect factors.npy", &["factors.npy", "0.5, neither 0 nor 1", mend]);
}

#[test]
fn masks_of_other_models() {
    let world = World::with_mask();
    world.done("convert mask.safetensors bare.npy");
    let other = Tiny { rope_base: 500.0, ..Tiny::default() };
    other.write_folder(&world.path("model-b"));
    let wide = Tiny { head_dim: 32, ..Tiny::default() };
    wide.write_folder(&world.path("model-c"));
    let deep = Tiny { layers: 3, ..Tiny::default() };
    deep.write_folder(&world.path("model-d"));
    let eval = |model: &str, mask: &str| {
        format!("eval --model {model} --mask {mask} --text text.txt --context 100 --positions 8")
    };
    let generate =
        |model: &str, mask: &str| format!("generate --model {model} --mask {mask} --prompt abc");
    for command in [eval, generate] {
        let mask = "mask.safetensors";
        world.fails(&command("model-b", mask), &[mask, "another model", "RoPE", "learn a mask"]);
        world.fails(&command("model-c", mask), &[mask, "head_dim 32", "learn a mask"]);
        world.fails(&command("model-d", mask), &[mask, "3 layers", "learn a mask"]);
        // Bare numbers: only the shape can tell.
        world.fails(&command("model-c", "bare.npy"), &["bare.npy", "head_dim 16", "head_dim 32"]);
        world.fails(&command("model-d", "bare.npy"), &["bare.npy", "2 layers", "3 layers"]);
    }
}

#[test]
fn texts_that_cannot_be_used() {
    let world = World::with_mask();
    world.write("empty.txt", "");
    world.write("blank.txt", " \n\t\n");
    world.write("short.txt", "only a few words");
    world.write("latin.txt", b"caf\xe9 au lait ".repeat(100));
    let dump = |text: &str| DUMP.replace("text.txt", text).replace("--out dump", "--out d");
    let eval = |text: &str| format!("{EVAL} --mask mask.safetensors --text {text} --context 100");
    for command in [dump, eval] {
        world.fails(&command("empty.txt"), &["empty.txt", "empty"]);
        world.fails(&command("blank.txt"), &["blank.txt", "empty"]);
        world.fails(&command("short.txt"), &["short.txt", "has 16 tokens", "longer text"]);
        world.fails(&command("text.txt short.txt"), &["short.txt", "longer text"]);
        world.fails(&command("latin.txt"), &["latin.txt", "UTF-8", "byte 3"]);
    }
    let generate = "generate --model model --prompt-file";
    world.fails(&format!("{generate} empty.txt"), &["empty.txt"]);
    world.fails(&format!("{generate} latin.txt"), &["latin.txt", "UTF-8"]);
    let prompt = world.command("generate --model model --prompt").arg("").output().unwrap();
    crate::world::Outcome::new(prompt).assert_failed(&["prompt is empty"]);
}

#[test]
fn more_context_than_the_model_has() {
    let world = World::with_mask();
    let limit = CONTEXT.to_string();
    let prefix = DUMP.replace("60..90", "60..1000").replace("--out dump", "--out d");
    world.fails(&prefix, &["1008", &limit, "prefix"]);
    world.fails(
        &format!("{EVAL} --mask mask.safetensors --text text.txt --context 5000"),
        &["5000", &limit, "context"],
    );
    world.fails("generate --model model --prompt-file text.txt", &["3000", &limit]);
    world.fails("generate --model model --prompt abc --tokens 10000", &["10000", &limit]);
    let most = u64::MAX.to_string();
    let generate = format!("generate --model model --prompt abc --tokens {most}");
    world.fails(&generate, &[&most, &limit]);
}

#[test]
fn budgets_and_counts_that_cannot_be() {
    let world = World::with_dump();
    let learn = |rest: &str| format!("learn dump --sink 4 --recent 8 --out x.safetensors {rest}");
    for align in ["5 --step 5", "12", "100", "0", "0 --method e1", "12 --method static"] {
        let (divides, will_do) = ("does not divide head_dim 16", "1, 2, 4, 8, 16 would do");
        world.fails(
            &learn(&format!("--k-ratio 0.5 --align {align}")),
            &["--align: ", divides, will_do],
        );
    }
    world.fails(&learn("--k-ratio 0.5 --align 4 --step 0"), &["--step: "]);
    world.fails(&learn("--k-ratio 0.5 --align 4 --step 3"), &["step", "3"]);
    world.fails(&learn("--k-ratio 0.5 --align 4 --step 8"), &["step", "8", "4"]);
    world.fails(&learn("--bytes 0.1 --align 4 --exempt 0"), &["budget", "bytes 0.5 or more"]);
    world.fails(&learn("--k-ratio 0.9 --align 4 --step 4 --exempt 0"), &["k-ratio 0.5 or less"]);
    world.fails(&learn("--k-ratio 0.5 --align 4 --exempt 7"), &["--exempt: ", "7", "2"]);
    let dump = DUMP.replace("--out dump", "--out d");
    world.fails(&format!("{dump} --probes 0"), &["--probes: ", "1"]);
    world.fails(&format!("{dump} --probes 5000"), &["--probes: ", "1024"]);
    for count in ["0", "99999999999999"] {
        let sequences = dump.replace("--sequences 4", &format!("--sequences {count}"));
        world.fails(&sequences, &["--sequences: "]);
    }
    world.fails(&dump.replace("--positions 8", "--positions 0"), &["--positions: "]);
}

#[test]
fn caches_that_cannot_be() {
    let world = World::with_mask();
    world.fails("plan --mask mask.safetensors --block 0", &["--block: 0"]);
    world.fails("plan --mask mask.safetensors --block 100000000000", &["--block: "]);
    let eval = format!("{EVAL} --mask mask.safetensors --text text.txt --context 100");
    // Before the text is even found too short.
    world.write("short.txt", "only a few words");
    world.fails(&format!("{eval} --block 0").replace("text.txt", "short.txt"), &["--block: 0"]);
    world.fails(&eval.replace("100", "8"), &["--positions: ", "8"]);
    world.fails(&format!("{eval} --batch 0"), &["--batch: "]);
    world.fails(&eval.replace("--sequences 1", "--sequences 0"), &["--sequences: "]);
    let most = usize::MAX;
    world.fails(&eval.replace("--sequences 1", &format!("--sequences {most}")), &["--sequences: "]);
    world.fails(&format!("{eval} --tasks needle --items {most}"), &["--items: "]);
}

#[test]
fn dumps_that_are_damaged() {
    let world = World::with_dump();
    let learn = format!("{LEARN} --k-ratio 0.5 --out x.safetensors");
    let layer = "dump/layer-001.safetensors";
    let whole = world.read(layer);
    for len in [0, 5, 100, whole.len() / 2, whole.len() - 1] {
        world.write(layer, &whole[..len]);
        world.fails(&learn, &["layer-001.safetensors", "dump again"]);
    }
    // The last value of the last tensor, in f16.
    for (bits, name) in [(0x7e00u16, "NaN"), (0x7c00, "inf"), (0xfc00, "-inf"), (0x3555, "")] {
        let mut bytes = whole.clone();
        let end = bytes.len();
        bytes[end - 2..].copy_from_slice(&bits.to_le_bytes());
        world.write(layer, &bytes);
        let damaged = format!("..{end} (sequence 3, tensor v, KV head 1)");
        world.fails(&learn, &["layer-001.safetensors", "damaged", &damaged, "dump again"]);
        if !name.is_empty() {
            // By a writer that takes no checksums.
            let at = bytes.windows(10).position(|bytes| bytes == b"leank.sums").unwrap();
            bytes[at..at + 10].copy_from_slice(b"other.sums");
            world.write(layer, bytes);
            world.fails(&learn, &["layer-001.safetensors", "layer 1", name, "dump again"]);
        }
    }
    fs::copy(world.path("dump/layer-000.safetensors"), world.path(layer)).unwrap();
    world.fails(&learn, &["layer-001.safetensors", "elsewhere"]);
    world.done(&format!("{DUMP} --seed 9").replace("--out dump", "--out d"));
    fs::copy(world.path("d/layer-001.safetensors"), world.path(layer)).unwrap();
    world.fails(&learn, &["layer-001.safetensors", "elsewhere"]);
    fs::remove_file(world.path(layer)).unwrap();
    world.fails(&learn, &["layer-001.safetensors", "No such file"]);
    world.write(layer, &whole);
    world.done(&learn);
}

#[test]
fn manifests_that_are_damaged() {
    let world = World::with_dump();
    let learn = format!("{LEARN} --k-ratio 0.5 --out x.safetensors");
    let manifest = String::from_utf8(world.read("dump/manifest.json")).unwrap();
    world.write("dump/manifest.json", &manifest[..manifest.len() / 2]);
    world.fails(&learn, &["manifest.json"]);
    let version = manifest.replacen("\"version\": 1", "\"version\": 99", 1);
    assert_ne!(version, manifest);
    world.write("dump/manifest.json", version);
    world.fails(&learn, &["manifest.json", "version 99", "dump again"]);
    let positions = manifest.replacen("\"positions\": 8", "\"positions\": 9", 1);
    assert_ne!(positions, manifest);
    world.write("dump/manifest.json", positions);
    world.fails(&learn, &["dump"]);
}

#[test]
fn places_that_are_taken() {
    let world = World::with_dump();
    world.fails(&DUMP.replace("--out dump", "--out text.txt"), &["text.txt", "is a file"]);
    world.fails(&DUMP.replace("--out dump", "--out model"), &["model", "holds no dump"]);
    // Before a model is loaded.
    world.fails(&DUMP.replace("--model model", "--model no.gguf"), &["dump", "--overwrite"]);
    fs::create_dir(world.path("folder.npy")).unwrap();
    world.fails(&format!("{LEARN} --k-ratio 0.5 --out folder.npy"), &["folder.npy", "is a folder"]);
}
