//! `leank report`: one page that is HTML, asks for nothing and says what the other commands say.

use std::{cell::RefCell, collections::BTreeMap, time::SystemTime};

use html5ever::tokenizer::{
    BufferQueue, Tag, TagKind, Token, TokenSink, TokenSinkResult, Tokenizer, TokenizerOpts,
    states::{RawKind, State},
};
use leank::{
    MaskInfo, ModelMask,
    files::{read_mask, write_mask},
};

use crate::{
    model::Tiny,
    world::{LEARN, World, visit},
};

/// What a parser of HTML sees in a page.
#[derive(Default)]
struct Page {
    errors: Vec<String>,
    open: Vec<String>,
    tags: Vec<Tag>,
    text: String,
}

const VOID: [&str; 4] = ["meta", "link", "br", "input"];

/// Collects what the tokenizer finds, and checks that elements end in the order they began.
#[derive(Default)]
struct Sink(RefCell<Page>);

impl TokenSink for Sink {
    type Handle = ();

    fn process_token(&self, token: Token, line: u64) -> TokenSinkResult<()> {
        let mut page = self.0.borrow_mut();
        match token {
            Token::TagToken(tag) => {
                let name = tag.name.to_string();
                if tag.kind == TagKind::EndTag {
                    let open = page.open.pop();
                    if open.as_ref() != Some(&name) {
                        page.errors.push(format!("line {line}: </{name}> ends {open:?}"));
                    }
                    return TokenSinkResult::Continue;
                }
                if !VOID.contains(&name.as_str()) {
                    page.open.push(name.clone());
                }
                page.tags.push(tag);
                return match name.as_str() {
                    "script" => TokenSinkResult::RawData(RawKind::ScriptData),
                    "style" => TokenSinkResult::RawData(RawKind::Rawtext),
                    _ => TokenSinkResult::Continue,
                };
            }
            Token::CharacterTokens(text) => page.text.push_str(&text),
            Token::ParseError(error) => page.errors.push(format!("line {line}: {error}")),
            _ => {}
        }
        TokenSinkResult::Continue
    }
}

impl Page {
    fn read(world: &World, name: &str) -> Self {
        let html = String::from_utf8(world.read(name)).unwrap();
        assert!(html.starts_with("<!DOCTYPE html>"));
        for outside in ["http://", "https://", "url(http", "@import"] {
            assert!(!html.contains(outside), "{outside} is in the page");
        }
        let queue = BufferQueue::default();
        queue.push_back(html.as_str().into());
        let options = TokenizerOpts { initial_state: Some(State::Data), ..Default::default() };
        let tokenizer = Tokenizer::new(Sink::default(), options);
        // Stops at every script, as a browser does.
        while !queue.is_empty() {
            let _ = tokenizer.feed(&queue);
        }
        tokenizer.end();
        let page = tokenizer.sink.0.into_inner();
        assert_eq!(page.errors, [] as [&str; 0]);
        assert_eq!(page.open, [] as [&str; 0], "elements that do not end");
        for number in ["NaN", "inf"] {
            let odd = |tag: &&Tag| tag.attrs.iter().any(|own| &*own.value == number);
            assert!(!page.tags.iter().any(|tag| odd(&tag)), "{number}");
        }
        page
    }

    fn attribute(tag: &Tag, name: &str) -> Option<String> {
        tag.attrs.iter().find(|own| &*own.name.local == name).map(|own| own.value.to_string())
    }

    fn ids(&self) -> Vec<String> {
        self.tags.iter().filter_map(|tag| Self::attribute(tag, "id")).collect()
    }

    fn has(&self, text: &str) -> bool {
        self.text.contains(text)
    }
}

const SECTIONS: [&str; 7] =
    ["importance", "counts", "curves", "measured", "memory", "comparison", "spectrum"];
const FIGURES: [&str; 9] = [
    "difference-map",
    "importance-map",
    "kept-counts",
    "loss-by-layer",
    "loss-curves",
    "overlap",
    "predicted-measured",
    "rope-spectrum",
    "whole-kv-ratio",
];

const EVAL: &str = "eval --model model --mask mask.safetensors other.safetensors --text other.txt \
     --context 300 --positions 16 --sequences 2 --tasks passkey --items 2 --json";

/// With two masks and their evaluation.
fn world() -> World {
    let world = World::with_mask();
    world.done(&format!("{LEARN} --bytes 0.4 --out other.safetensors"));
    world.write("eval.json", world.done(EVAL));
    world
}

fn written(world: &World) -> BTreeMap<std::path::PathBuf, SystemTime> {
    let mut times = BTreeMap::new();
    visit(&world.path("dump"), &mut |path, metadata| {
        times.insert(path.to_owned(), metadata.modified().unwrap());
    });
    times
}

#[test]
fn a_report_shows_what_it_is_given() {
    let world = world();
    let dump = written(&world);
    let all =
        "report --mask mask.safetensors --dump dump --eval eval.json --compare other.safetensors";
    let said = world.done(&format!("{all} --figures figures"));
    assert!(said.starts_with("report.html: 9 figures"), "{said}");
    assert_eq!(written(&world), dump, "a report computes nothing and writes nothing to the dump");
    let page = Page::read(&world, "report.html");
    let ids = page.ids();
    for id in SECTIONS.iter().chain(&FIGURES) {
        assert_eq!(ids.iter().filter(|own| own == id).count(), 1, "{id}: {ids:?}");
    }
    let unique: std::collections::BTreeSet<_> = ids.iter().collect();
    assert_eq!(unique.len(), ids.len(), "{ids:?}");
    // The same numbers as the other commands.
    let plan = world.json("plan --mask mask.safetensors --context 2048 --json");
    let ratio = plan["contexts"][0]["whole_kv_ratio"].as_f64().unwrap();
    assert!(page.has(&format!("{ratio:.3}")), "{ratio}");
    let eval: serde_json::Value = serde_json::from_slice(&world.read("eval.json")).unwrap();
    let same = eval[0]["text"]["kl"].as_f64().unwrap() / eval[0]["predicted_kl"].as_f64().unwrap();
    assert!(page.has(&format!("The measured KL is {same:.2} times the predicted one")), "{same}");
    assert!(page.has("mask (this mask)") && !page.has("other (this mask)"));
    let html = String::from_utf8(world.read("report.html")).unwrap();
    let scatter = html.split("id=\"predicted-measured\"").nth(1).unwrap();
    let scatter = scatter.split("</svg>").next().unwrap();
    let circles: Vec<_> = scatter.split("<circle class=\"").skip(1).collect();
    assert!(
        circles.len() == 2 && circles[1].starts_with("f1\""),
        "nothing lies on this mask's point"
    );
    assert!(page.has("sink 4, recent 8") && page.has("text.txt"), "what it was learned from");
    assert!(!page.has("Not in this report"));
    // Figures stand alone as XML.
    for name in FIGURES {
        let svg = String::from_utf8(world.read(&format!("figures/{name}.svg"))).unwrap();
        let document = roxmltree::Document::parse(&svg).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert!(document.root_element().has_tag_name(("http://www.w3.org/2000/svg", "svg")));
        assert!(!svg.contains("var(--"), "{name} has colours of its own");
        assert!(svg.contains("prefers-color-scheme:dark"), "{name} has no dark theme");
    }
    // And again, byte by byte.
    let page = world.read("report.html");
    world.done(&format!("{all} --out again.html --figures png --format png"));
    assert_eq!(world.read("again.html"), page);
    for name in FIGURES {
        assert!(world.read(&format!("png/{name}.png")).starts_with(b"\x89PNG"));
    }
}

#[test]
fn a_bare_mask_has_a_report_too() {
    let world = World::with_mask();
    world.done("convert mask.safetensors bare.npy");
    world.done("report --mask bare.npy --out bare.html");
    let page = Page::read(&world, "bare.html");
    assert!(page.has("no fingerprint") && page.has("carries no scores"));
    assert!(page.has("--dump DIR") && page.has("--eval FILE") && page.has("--compare MASK"));
    assert!(!page.ids().contains(&"curves".to_owned()));
    // Formats stand in the grid of counts.
    world.done(&format!("{LEARN} --bytes 0.3 --formats k8,v4 --out coded.safetensors"));
    world.done("report --mask coded.safetensors --dump dump --out coded.html");
    let page = Page::read(&world, "coded.html");
    assert!(page.has("8/4") && page.has("k8v4") && page.has("count the bits"), "formats");
    // A method without curves.
    world.done(&format!("{LEARN} --method leank --k-ratio 0.5 --out leank.safetensors"));
    world.done("report --mask leank.safetensors --dump dump --out leank.html");
    assert!(Page::read(&world, "leank.html").has("it has no curves to show"));
}

/// The mask with other words in it.
fn reworded(world: &World, name: &str, change: impl FnOnce(MaskInfo) -> MaskInfo) -> ModelMask {
    let mask = read_mask(&world.path("mask.safetensors"), &Default::default()).unwrap();
    let info = change(mask.info().clone());
    let mask = mask.with_info(info).unwrap();
    write_mask(&world.path(name), &mask).unwrap();
    mask
}

#[test]
fn words_from_files_stay_words() {
    const EVIL: &str =
        "</title><script>alert(1)</script><img src=x onerror=alert(2)>\u{202e}\0\"'&";
    let world = world();
    reworded(&world, "evil.safetensors", |info| {
        let mut fingerprint = info.fingerprint.clone().unwrap();
        fingerprint.architecture = EVIL.into();
        fingerprint.rope_scaling = Some(EVIL.into());
        fingerprint.config_hash = EVIL.into();
        MaskInfo {
            model_id: Some(EVIL.into()),
            method: Some(EVIL.into()),
            budget: Some(EVIL.repeat(100)),
            created_by: Some(EVIL.into()),
            fingerprint: Some(fingerprint),
            ..info
        }
    });
    let mut eval: serde_json::Value = serde_json::from_slice(&world.read("eval.json")).unwrap();
    eval[0]["mask"] = EVIL.into();
    eval[0]["tasks"][0]["task"] = EVIL.into();
    world.write("evil.json", eval.to_string());
    world.done(
        "report --mask evil.safetensors --eval evil.json --compare evil.safetensors --figures figures",
    );
    let page = Page::read(&world, "report.html");
    let scripts: Vec<_> = page.tags.iter().filter(|tag| &*tag.name == "script").collect();
    // Ours, and the numbers of two heat maps.
    assert_eq!(scripts.len(), 3);
    assert!(page.tags.iter().all(|tag| &*tag.name != "img"));
    let handler = |tag: &Tag| tag.attrs.iter().any(|own| own.name.local.starts_with("on"));
    assert!(!page.tags.iter().any(handler));
    assert!(page.has("<script>alert(1)"), "shown as text");
    assert!(!page.has("\u{202e}") && !page.has("\0"), "what steers the display is gone");
    assert!(!page.has(&EVIL.repeat(5)), "long words are cut");
    for name in ["importance-map", "predicted-measured", "overlap"] {
        let svg = String::from_utf8(world.read(&format!("figures/{name}.svg"))).unwrap();
        roxmltree::Document::parse(&svg).unwrap();
    }
}

#[test]
fn odd_numbers_do_not_break_a_page() {
    let world = World::with_mask();
    for (name, predicted_kl, rope_base) in
        [("a", 1e6, 1e300), ("b", 1e-300, 0.0), ("c", 0.0, 1.0), ("d", 5e-324, -5.0)]
    {
        let file = format!("{name}.safetensors");
        let mask = reworded(&world, &file, |info| {
            let mut fingerprint = info.fingerprint.clone().unwrap();
            fingerprint.rope_base = rope_base;
            let windows = leank::Windows { sink: usize::MAX, recent: usize::MAX };
            MaskInfo {
                predicted_kl: Some(predicted_kl),
                fingerprint: Some(fingerprint),
                windows: Some(windows),
                ..info
            }
        });
        // Scores at the ends of what f32 can hold.
        let ends = [f32::MAX, f32::MIN, 0.0, f32::MIN_POSITIVE, -1.0, 1e-45];
        let scores = (0..mask.channels()).map(|at| ends[at % ends.len()]).collect();
        write_mask(&world.path(&file), &mask.with_scores(scores).unwrap()).unwrap();
        world.done(&format!("report --mask {file} --compare mask.safetensors --figures figures"));
        let page = Page::read(&world, "report.html");
        assert!(!page.has("NaN"), "{name}");
    }
}

#[test]
fn reports_that_cannot_be_made() {
    let world = world();
    let report = "report --mask mask.safetensors";
    world.fails("report --mask gone.npy", &["gone.npy"]);
    world.fails(&format!("{report} --out no/report.html"), &["--out", "no/report.html", "folder"]);
    world.fails(&format!("{report} --out dump"), &["--out", "is a folder"]);
    world.fails(&format!("{report} --out ./mask.safetensors"), &["--out", "is read too"]);
    world.fails(&format!("{report} --dump gone"), &["--dump", "gone", "leank dump --out"]);
    world.fails(&format!("{report} --eval gone.json"), &["--eval", "gone.json"]);
    for (name, text) in [("a.json", "{"), ("b.json", "[{\"mask\": 1}]"), ("c.json", "[1e999]")] {
        world.write(name, text);
        world.fails(&format!("{report} --eval {name}"), &["--eval", name, "leank eval --json"]);
    }
    // A dump without the records that would be shown.
    std::fs::rename(world.path("dump/learn"), world.path("learn")).unwrap();
    world.fails(
        &format!("{report} --dump dump"),
        &["--dump", "no record of e2 with sink 4 and recent 8", "`leank learn dump --method e2"],
    );
    std::fs::rename(world.path("learn"), world.path("dump/learn")).unwrap();
    // Another shape, another model.
    let other = World::with_model(Tiny { kv_heads: 4, ..Tiny::default() });
    other.done(crate::world::DUMP);
    other.done(&format!("{LEARN} --k-ratio 0.5 --out mask.safetensors"));
    world.write("wide.safetensors", other.read("mask.safetensors"));
    world.fails(&format!("{report} --compare wide.safetensors"), &["--compare", "4 KV heads"]);
    // The mask is what the report is about: the dump is wrong, and named first.
    let of_another = ["--dump: dump: is of another model than wide.safetensors", "4 KV heads"];
    world.fails("report --mask wide.safetensors --dump dump", &of_another);
    reworded(&world, "base.safetensors", |info| {
        let mut fingerprint = info.fingerprint.clone().unwrap();
        fingerprint.rope_base = 77.0;
        MaskInfo { fingerprint: Some(fingerprint), ..info }
    });
    let of_another = ["--dump: dump: is of another model", "the RoPE base is ", "not 77;"];
    world.fails("report --mask base.safetensors --dump dump", &of_another);
    assert!(!world.path("report.html").exists());
}

#[test]
fn evaluations_that_say_nothing_about_the_mask() {
    let world = world();
    let warnings = |files: &str| -> String {
        let outcome = world.run(&format!("report --mask mask.safetensors --eval {files}"));
        assert_eq!(outcome.code, Some(0), "{outcome:?}");
        outcome.stderr
    };
    assert_eq!(warnings("eval.json"), "");
    world.write("none.json", "[]");
    assert_eq!(warnings("none.json"), "warning: --eval: none.json: holds no evaluation\n");
    assert_eq!(warnings("none.json eval.json").lines().count(), 1);
    let all: serde_json::Value = serde_json::from_slice(&world.read("eval.json")).unwrap();
    world.write("other.json", serde_json::json!([all[1]]).to_string());
    let said = warnings("other.json");
    assert!(said.starts_with("warning: --eval: other.json: no evaluation of this mask"), "{said}");
    assert!(Page::read(&world, "report.html").has("None of the evaluations is of this mask"));
    assert_eq!(warnings("other.json eval.json"), "", "one of them is");
    // NaN is written as null.
    let mut nan = all.clone();
    nan[0]["text"]["kl"] = serde_json::Value::Null;
    world.write("nan.json", nan.to_string());
    assert_eq!(warnings("nan.json"), "");
    let page = Page::read(&world, "report.html");
    assert!(page.has("The measured KL is not finite") && !page.has("None of the evaluations"));
    // Without a text.
    nan[0]["text"] = serde_json::Value::Null;
    world.write("tasks.json", nan.to_string());
    assert_eq!(warnings("tasks.json"), "");
    assert!(Page::read(&world, "report.html").has("no KL was measured"));
    std::fs::remove_file(world.path("report.html")).unwrap();
    // Numbers that no measurement gives.
    let report = "report --mask mask.safetensors --eval bad.json";
    for (at, field) in [(0, "predicted_kl"), (1, "kept_k")] {
        let mut bad = all.clone();
        bad[at][field] = (-0.5).into();
        world.write("bad.json", bad.to_string());
        let place = format!("{field} of evaluation {at} is -0.5");
        world.fails(report, &["--eval: bad.json", &place]);
    }
    for field in ["kl", "kl_standard_error", "dense_perplexity", "lean_perplexity"] {
        let mut bad = all.clone();
        bad[1]["text"][field] = (-1).into();
        world.write("bad.json", bad.to_string());
        world.fails(report, &["--eval: bad.json", &format!("text.{field} of evaluation 1 is -1")]);
    }
    let mut bad = all;
    bad[0]["text"]["kl"] = "much".into();
    let infinite = serde_json::to_string_pretty(&bad).unwrap().replace("\"much\"", "1e999");
    world.write("bad.json", infinite);
    world.fails(report, &["--eval: bad.json", "kl: number out of range"]);
}
