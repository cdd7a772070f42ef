//! What works: from a model and text to a mask, figures and tokens.

use std::{collections::BTreeMap, fs, path::PathBuf, time::SystemTime};

use serde_json::Value;

use crate::{
    model::Tiny,
    world::{DUMP, LEARN, World, visit},
};

#[test]
fn from_a_model_and_text_to_tokens() {
    let world = World::with_dump();
    let learned = world.json(&format!("{LEARN} --k-ratio 0.5 --out mask.safetensors --json"));
    assert!(number(&learned["kept_k"]) <= 0.5);

    let inspected = world.json("inspect mask.safetensors --json");
    assert_eq!(inspected["kept_k"], learned["kept_k"]);
    assert_eq!(inspected["info"]["model_id"], "model");
    assert_eq!(inspected["info"]["method"], "e2");
    let counts: Vec<Vec<u64>> = serde_json::from_value(inspected["kept_counts"].clone()).unwrap();
    assert_eq!((counts.len(), counts[0].len()), (2, 2));
    assert!(counts.iter().flatten().all(|count| count % 4 == 0), "{counts:?}");

    let text = world.done("inspect mask.safetensors");
    assert!(text.contains("sink 4, recent 8") && text.contains("heads by kept channels"), "{text}");
    world.done("plan --mask mask.safetensors --memory 1MiB");

    let evaluated = world.json(
        "eval --model model --mask mask.safetensors --text other.txt --context 300 \
         --positions 16 --sequences 2 --tasks passkey --items 2 --json",
    );
    let entry = &evaluated[0];
    assert_eq!(entry["kept_k"], learned["kept_k"]);
    assert!(number(&entry["text"]["kl"]) > 0.0, "half of the channels cost nothing: {entry}");
    assert_eq!(entry["tasks"][0]["items"], 2);
    world.done(
        "eval --model model --mask mask.safetensors --text other.txt --context 300 --positions 16 \
         --sequences 2",
    );
}

/// Everything below a folder with the time it was last written.
fn written(folder: PathBuf) -> BTreeMap<PathBuf, SystemTime> {
    let mut times = BTreeMap::new();
    visit(&folder, &mut |path, metadata| {
        times.insert(path.to_owned(), metadata.modified().unwrap());
    });
    times
}

#[test]
fn a_second_budget_reads_the_records_of_the_first() {
    let world = World::with_mask();
    let records = written(world.path("dump/learn"));
    assert_eq!(records.keys().filter(|path| path.is_file()).count(), 2, "{records:?}");
    // Activations that cannot be measured any more: only the records are left to read.
    for layer in ["dump/layer-000.safetensors", "dump/layer-001.safetensors"] {
        let mut bytes = world.read(layer);
        let end = bytes.len();
        bytes[end - 4000..].fill(0xff);
        world.write(layer, bytes);
    }
    world.done(&format!("{LEARN} --bytes 0.6 --out bytes.safetensors"));
    world.done(&format!("{LEARN} --k-ratio 0.5 --out again.safetensors"));
    assert_eq!(written(world.path("dump/learn")), records);
    assert_eq!(world.read("again.safetensors"), world.read("mask.safetensors"));
    let summary = world.json("inspect bytes.safetensors --json");
    assert!(number(&summary["middle_bytes"]) <= 0.6);
    assert_ne!(world.read("bytes.safetensors"), world.read("mask.safetensors"));
    // Other windows are another measurement.
    world.fails(
        "learn dump --align 4 --step 4 --sink 4 --recent 16 --k-ratio 0.5 --out x.safetensors",
        &["damaged at bytes", "dump again"],
    );
}

#[test]
fn a_plan_is_what_the_cache_takes() {
    let world = World::with_mask();
    for cache in ["", "--block 16", "--block 16 --dtype f32 --sink 20", "--block 8 --recent 100"] {
        for context in [64, 129, 200] {
            let plan = world
                .json(&format!("plan --mask mask.safetensors --context {context} --json {cache}"));
            let plan = &plan["contexts"][0];
            let eval = world.json(&format!(
                "eval --model model --mask mask.safetensors --text other.txt --sequences 1 \
                 --positions 8 --context {context} --json {cache}"
            ));
            let cache_bytes = &eval[0]["cache"];
            assert_eq!(cache_bytes["tokens"], context);
            assert_eq!(plan["bytes"], cache_bytes["bytes"], "{context} {cache}");
            assert_eq!(plan["dense_bytes"], cache_bytes["dense_bytes"], "{context} {cache}");
            assert_eq!(plan["whole_kv_ratio"], eval[0]["whole_kv_ratio"], "{context} {cache}");
        }
    }
}

#[test]
fn windows_longer_than_the_context_prune_nothing() {
    let world = World::with_mask();
    let eval = world.json(
        "eval --model model --mask mask.safetensors --text other.txt --sequences 2 --positions 8 \
         --context 192 --recent 100000 --dtype f32 --json",
    );
    assert_eq!(number(&eval[0]["whole_kv_ratio"]), 1.0);
    assert!(number(&eval[0]["text"]["kl"]).abs() < 1e-6, "{eval}");
    assert_eq!(number(&eval[0]["text"]["top1_agreement"]), 1.0);

    // Nor is there anything to learn from.
    world.fails(
        "learn dump --align 4 --step 4 --sink 4 --recent 500 --k-ratio 0.75 --out wide.safetensors",
        &["sink 4, recent 500", "no middle", "dump longer prefixes"],
    );
}

#[test]
fn positions_without_a_middle_are_told() {
    let world = World::with_dump();
    // The shortest prefix has 60 tokens, the longest 90.
    let outcome = world.run(
        "learn dump --align 4 --step 4 --sink 4 --recent 70 --k-ratio 0.5 --out mask.safetensors",
    );
    assert_eq!(outcome.code, Some(0), "{outcome:?}");
    let warning = "of 32 positions nothing lies between --sink and --recent";
    assert!(outcome.stderr.contains(warning), "{outcome:?}");
    let outcome = world.run(&format!("{LEARN} --k-ratio 0.5 --out mask.safetensors"));
    assert!(!outcome.stderr.contains("warning"), "{outcome:?}");
}

#[test]
fn ranks_get_their_heads() {
    let world = World::with_mask();
    let told = world.json("shard mask.safetensors --world 2 --out ranks --json");
    let file: Value = serde_json::from_slice(&world.read("ranks/partition.json")).unwrap();
    assert_eq!(told, file);
    let counts = |mask: &str| -> Vec<Vec<u64>> {
        let inspected = world.json(&format!("inspect {mask} --json"));
        serde_json::from_value(inspected["kept_counts"].clone()).unwrap()
    };
    let whole = counts("mask.safetensors");
    let ranks = ["ranks/rank-0.safetensors", "ranks/rank-1.safetensors"].map(counts);
    for (layer, heads) in whole.iter().enumerate() {
        let order: Vec<usize> = serde_json::from_value(file["order"][layer].clone()).unwrap();
        let own: Vec<u64> = ranks.iter().flat_map(|rank| &rank[layer]).copied().collect();
        assert_eq!(own, order.iter().map(|&head| heads[head]).collect::<Vec<_>>());
    }
    let table = world.done("shard mask.safetensors --world 1 --split contiguous");
    assert!(table.contains("balanced") && table.contains("1.000"), "{table}");
    world.fails("shard mask.safetensors --world 3", &["3 ranks", "2 KV heads"]);
    world.write("file", "");
    world.fails("shard mask.safetensors --world 2 --out file", &["--out: file: is a file"]);
}

#[test]
fn what_was_learned_from_is_known_again() {
    let world = World::with_mask();
    world.write("renamed.txt", world.read("text.txt"));
    let sizes = "--context 192 --sequences 1 --positions 8 --json";
    let eval = |text: &str| {
        world.run(&format!("eval --model model --mask mask.safetensors --text {text} {sizes}"))
    };
    let (own, other) = (eval("renamed.txt"), eval("other.txt"));
    let warning = "mask.safetensors was learned from renamed.txt";
    assert!(own.stderr.contains(warning) && !other.stderr.contains("warning"), "{own:?} {other:?}");
    for (outcome, text, told) in [(own, "renamed.txt", true), (other, "other.txt", false)] {
        let json: Value = serde_json::from_str(&outcome.stdout).unwrap();
        assert_eq!(json[0]["texts"][0]["name"], text);
        world.write("eval.json", outcome.stdout);
        world.done("report --mask mask.safetensors --eval eval.json --out report.html");
        let page = String::from_utf8(world.read("report.html")).unwrap();
        assert_eq!(page.contains("which the mask was learned from"), told, "{text}");
        let check = world.run(&format!(
            "check --model model --mask mask.safetensors --text {text} {sizes} --items 0"
        ));
        assert_eq!(check.stdout.contains("was learned from"), told, "{check:?}");
    }
}

#[test]
fn generation_follows_the_mask_and_the_windows() {
    let world = World::with_mask();
    let prompt = String::from_utf8(world.read("text.txt")).unwrap();
    world.write("prompt.txt", &prompt[..300]);
    let generate = "generate --model model --prompt-file prompt.txt --tokens 24";
    let dense = world.done(generate);
    assert!(dense.chars().count() > 8, "{dense:?}");
    assert_eq!(world.done(generate), dense, "not the same every time");
    let lean = format!("{generate} --mask mask.safetensors --block 16");
    assert_eq!(world.done(&format!("{lean} --recent 4096")), dense);
    assert_ne!(world.done(&lean), dense, "half of the channels make no difference");
    let outcome = world.run(&lean);
    assert!(outcome.stderr.contains("tokens/s"), "{outcome:?}");
    assert!(outcome.stderr.contains("whole-KV ratio 0."), "{outcome:?}");

    let mut command = world.command("generate --model model --tokens 5 --prompt");
    let output = command.arg("one and two").output().unwrap();
    assert!(output.status.success(), "{output:?}");
}

#[test]
fn converting_there_and_back_gives_the_same_bytes() {
    let world = World::with_mask();
    for (from, to) in [
        ("mask.safetensors", "a.pth"),
        ("a.pth", "a.npy"),
        ("a.npy", "b.safetensors"),
        ("b.safetensors", "b.pth"),
        ("b.pth", "c.safetensors"),
        ("c.safetensors", "c.npy"),
        ("mask.safetensors", "copy.safetensors"),
    ] {
        world.done(&format!("convert {from} {to}"));
    }
    for (a, b) in [
        ("a.pth", "b.pth"),
        ("a.npy", "c.npy"),
        ("b.safetensors", "c.safetensors"),
        ("mask.safetensors", "copy.safetensors"),
    ] {
        assert_eq!(world.read(a), world.read(b), "{a} and {b}");
    }
    let kept = |name: &str| world.json(&format!("inspect {name} --json"))["kept_counts"].clone();
    assert_eq!(kept("mask.safetensors"), kept("c.npy"));
    // What the other formats forget is said.
    let note = world.run("convert mask.safetensors d.npy").stderr;
    assert!(note.contains("which model"), "{note}");
    // Scaling factors: one line per layer and head.
    world.write("scales.tsv", "0.1\t0.9\t0.5\t0.2\n0.8\t0.7\t0.3\t0.4\n");
    world.done("convert scales.tsv scales.npy --shape 1,2,4 --ratio 0.5 --align 1");
    assert_eq!(kept("scales.npy"), serde_json::json!([[2, 2]]));
}

#[test]
fn a_gguf_file_goes_the_whole_way_too() {
    let world = World::new();
    Tiny::default().write_gguf(&world.path("tiny.gguf"));
    world.done(&DUMP.replace("--model model", "--model tiny.gguf --probe random --dtype bf16"));
    world.done(&format!("{LEARN} --method e1 --bytes 0.5 --out mask.safetensors"));
    world.done(
        "eval --model tiny.gguf --mask mask.safetensors --text other.txt --context 100 \
         --positions 8 --sequences 2",
    );
    let generate = "generate --model tiny.gguf --mask mask.safetensors --prompt abc --tokens 8";
    assert_eq!(world.done(generate), world.done(&format!("{generate} --as-stored")));
}

#[test]
fn a_dump_is_replaced_only_when_asked() {
    let world = World::with_dump();
    world.fails(DUMP, &["dump: holds a dump already", "--overwrite"]);
    let before = world.read("dump/manifest.json");
    world.done(&format!("{DUMP} --overwrite --seed 3"));
    assert_ne!(world.read("dump/manifest.json"), before);
    let names: Vec<_> = fs::read_dir(world.path(".")).unwrap().collect();
    assert_eq!(names.len(), 4, "{names:?}");
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or_else(|| panic!("{value} is no number"))
}
