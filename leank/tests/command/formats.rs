//! Lean blocks of 8 and 4 bits, from learning to generation.

use serde_json::Value;

use crate::world::{LEARN, World};

const ALL: &str = "--formats k16,k8,k4,v16,v8,v4";

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or_else(|| panic!("{value} is no number"))
}

#[test]
fn formats_go_the_whole_way() {
    let world = World::with_dump();
    let mask = "mask.safetensors";
    let learned = world.json(&format!("{LEARN} --bytes 0.3 {ALL} --out {mask} --json"));
    assert!(number(&learned["middle_bytes"]) <= 0.3);
    let by_format = &learned["heads_by_format"];
    let live: u64 = by_format.as_object().unwrap().values().map(|n| n.as_u64().unwrap()).sum();
    assert_eq!(live + learned["dead_heads"].as_u64().unwrap(), 4, "{learned}");

    let inspected = world.json(&format!("inspect {mask} --json"));
    assert_eq!(&inspected["heads_by_format"], by_format);
    let counts: Vec<Vec<u64>> = serde_json::from_value(inspected["kept_counts"].clone()).unwrap();
    let formats: Vec<Vec<Option<String>>> =
        serde_json::from_value(inspected["formats"].clone()).unwrap();
    for (count, format) in counts.iter().flatten().zip(formats.iter().flatten()) {
        assert_eq!(*count > 0, format.is_some(), "{inspected}");
    }
    let format = by_format.as_object().unwrap().keys().next().unwrap();
    let text = world.done(&format!("inspect {mask}"));
    assert!(text.contains("formats in lean blocks") && text.contains(format), "{text}");

    // A plan is what the cache takes, whoever says the formats.
    let mut kls = Vec::new();
    for cache in ["", "--formats k8v8", "--formats k4v4 --block 16", "--formats k16v16"] {
        let plan = world.json(&format!("plan --mask {mask} --context 300 --json {cache}"));
        let eval = world.json(&format!(
            "eval --model model --mask {mask} --text other.txt --sequences 1 --positions 8 \
             --context 300 --json {cache}"
        ));
        assert_eq!(plan["contexts"][0]["bytes"], eval[0]["cache"]["bytes"], "{cache}");
        assert_eq!(plan["middle_bytes"], eval[0]["middle_bytes"], "{cache}");
        assert_eq!(plan["heads_by_format"], eval[0]["heads_by_format"], "{cache}");
        let has_scales = number(&plan["scale_bytes"]) > 0.0;
        assert_eq!(has_scales, cache != "--formats k16v16", "{plan}");
        // What is predicted is for the mask's own formats.
        assert_eq!(eval[0]["predicted_kl"].is_null(), !cache.is_empty(), "{eval}");
        kls.push(number(&eval[0]["text"]["kl"]));
    }
    assert!(kls[2] > kls[3], "4 bits cost nothing: {kls:?}");

    let text = world.done(&format!("plan --mask {mask} --formats k8v4"));
    assert!(text.contains("lean blocks of k8v4: ") && text.contains("of them scales"), "{text}");
    let eval = "eval --model model --text other.txt --sequences 1 --positions 8 --context 200";
    let text = world.done(&format!("{eval} --mask {mask} --formats k8v4"));
    assert!(text.contains("formats") && text.contains("k8v4") && text.contains("middle"), "{text}");
    let generate = "generate --model model --prompt abcdefgh --tokens 100 --block 16 --recent 8";
    let outcome = world.run(&format!("{generate} --mask {mask} --formats k4v8"));
    assert_eq!(outcome.code, Some(0), "{outcome:?}");
    assert!(outcome.stderr.contains("lean blocks of k4v8"), "{outcome:?}");
}

#[test]
fn a_front_is_a_table_and_a_figure() {
    let world = World::with_dump();
    // No budget, no mask.
    assert_eq!(world.done(&format!("{LEARN} --pareto front {ALL}")), "");
    let table = String::from_utf8(world.read("front.tsv")).unwrap();
    let mut lines = table.lines();
    let header = lines.next().unwrap();
    assert_eq!(header, "bytes\tpredicted_kl\tkept_k\tkept_v\tbits_k\tbits_v");
    let rows: Vec<Vec<&str>> = lines.map(|line| line.split('\t').collect()).collect();
    assert!(rows.len() > 5, "{table}");
    assert_eq!(rows[0][0], "0.0000");
    for pair in rows.windows(2) {
        let of = |row: &[&str]| [0, 1].map(|i| row[i].parse::<f64>().unwrap());
        let ([bytes, kl], [more, less]) = (of(&pair[0]), of(&pair[1]));
        assert!(bytes < more && kl >= less, "{pair:?}");
    }
    let svg = String::from_utf8(world.read("front.svg")).unwrap();
    assert!(svg.contains("16, 8 and 4 bits") && svg.contains("pruned only"), "{svg}");
    // What was measured is not measured again, and a mask of the front is what the front says.
    let both = "--pareto again --bytes 0.5 --out half.safetensors --json";
    let learned = world.json(&format!("{LEARN} {ALL} {both}"));
    assert_eq!(world.read("again.tsv"), world.read("front.tsv"));
    let at = |row: &&Vec<&str>| row[0].parse::<f64>().unwrap() <= 0.5;
    let row = rows.iter().rfind(at).unwrap();
    let (front, own) = (row[1].parse::<f64>().unwrap(), number(&learned["predicted_kl"]));
    assert!((front - own).abs() <= 1e-3 * own, "{front} {own}");
}

#[test]
fn formats_that_cannot_be_had() {
    let world = World::with_dump();
    for (arguments, word) in [
        ("learn dump --bytes 0.3 --out m.safetensors --formats k8", "none for V"),
        ("learn dump --bytes 0.3 --out m.safetensors --formats k8v8", "k16,k8,k4,v16,v8,v4"),
        ("learn dump --bytes 0.3", "--out"),
        ("learn dump --pareto p --out m.safetensors", "--bytes"),
        ("plan --mask m.safetensors --formats k8", "k8v4"),
        ("generate --model model --prompt a --formats k8v8", "--mask"),
    ] {
        let outcome = world.run(arguments);
        assert_eq!(outcome.code, Some(2), "{arguments}: {outcome:?}");
        assert!(outcome.stderr.contains(word), "{arguments}: no {word:?} in: {}", outcome.stderr);
    }
    let out = "--out m.safetensors";
    world.fails(&format!("{LEARN} --k-ratio 0.5 {ALL} {out}"), &["--formats: ", "budget of bytes"]);
    for method in ["static", "leank"] {
        let learn = format!("{LEARN} --method {method}");
        world.fails(&format!("{learn} --bytes 0.5 {ALL} {out}"), &["--formats: ", "e2 or e1"]);
        world.fails(&format!("{learn} --pareto p"), &["--pareto: ", "e2 or e1"]);
    }
    world.fails(&format!("{LEARN} --pareto no/p"), &["--pareto: ", "no/p"]);
    for name in ["m.npy", "m.pth"] {
        let words = [name, "--out", "only .safetensors"];
        world.fails(&format!("{LEARN} --bytes 0.5 {ALL} --out {name}"), &words);
    }
    // Less than what may not be pruned takes: the least that would do is said.
    let exempt = format!("{LEARN} {ALL} --exempt 0 --bytes 0.4 {out}");
    world.fails(&exempt, &["bytes 0.4", "exempt layers alone", "ask for bytes 0.5 or more"]);
    // A mask that has formats is not written where they are lost.
    world.done(&format!("{LEARN} --bytes 0.3 --formats k8,v8 {out}"));
    for name in ["x.npy", "x.pth"] {
        world.fails(&format!("convert m.safetensors {name}"), &["TO", name, "only .safetensors"]);
    }
    world.done("convert m.safetensors copy.safetensors");
    assert_eq!(world.read("copy.safetensors"), world.read("m.safetensors"));
}
