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
    assert!(page.has("sink 4, recent 8") && page.has("text.txt"), "what it was learned from");
    assert!(!page.has("Not in this report"));
    // Figures stand alone as XML.
    for name in FIGURES {
        let svg = String::from_utf8(world.read(&format!("figures/{name}.svg"))).unwrap();
        let document = roxmltree::Document::parse(&svg).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert!(document.root_element().has_tag_name(("http://www.w3.org/2000/svg", "svg")));
        assert!(!svg.contains("var(--"), "{name} has colours of its own");
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
    world.fails("report --mask wide.safetensors --dump dump", &["wide.safetensors", "KV heads"]);
    assert!(!world.path("report.html").exists());
}
