//! `leank demo`: the other commands, one after the other, on a model that is part of this one.

use std::{
    ffi::OsString,
    fmt::Display,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::Context as _;
use leank::files::write_atomic;
use serde::{Deserialize, de::DeserializeOwned};

use crate::{output, target};

/// The model: see `leank/demo/README.md`.
const MODEL: [(&str, &[u8]); 3] = [
    ("config.json", include_bytes!("../../../demo/model/config.json")),
    ("tokenizer.json", include_bytes!("../../../demo/model/tokenizer.json")),
    ("model.safetensors", include_bytes!("../../../demo/model/model.safetensors")),
];
/// What masks are learned from: the beginning of Northanger Abbey.
const LEARN: &str = include_str!("../../../demo/learn.txt");
/// What they are measured on: the beginning of Persuasion.
const MEASURE: &str = include_str!("../../../demo/measure.txt");
/// Its first bytes are the prompt whose continuation is timed: some 7400 tokens.
const PROMPT_BYTES: usize = 20_000;
/// Tokens that are timed.
const TIMED: usize = 640;

/// Masks: their name, what the table calls them, and how they are learned.
const MASKS: [(&str, &str, &[&str]); 5] = [
    ("k50", "half of K's channels pruned", &["--k-ratio", "0.5"]),
    ("k70", "70 % pruned", &["--k-ratio", "0.7"]),
    ("k80", "80 % pruned", &["--k-ratio", "0.8"]),
    (
        "bits",
        "15 % of the bytes, 16 to 4 bits",
        &["--bytes", "0.15", "--formats", "k16,k8,k4,v16,v8,v4"],
    ),
    ("norms", "70 % pruned, by their norms", &["--k-ratio", "0.7", "--method", "static"]),
];
/// The mask that the report is about, and the one that it is compared with.
const SHOWN: (&str, &str) = ("k70", "norms");

/// See it work: in about a minute, without a network, on a small model that this command brings.
///
/// Runs `dump`, `learn`, `eval`, `generate` and `report` one after the other, says each before it does, and
/// ends with a table: what is left of the cache, what that costs in quality, what it gains in speed. All
/// files stay in --out, so that every step can be tried again in another way.
///
/// The model was trained to find facts in 4096 tokens and more. Its quality is no measure of yours: run
/// the same commands on your model.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// The folder for everything; files of an earlier demo are replaced.
    #[arg(long, value_name = "DIR", default_value = "leank-demo")]
    out: PathBuf,
    /// Tokens of context that masks are measured at, at most 8192.
    #[arg(long, default_value_t = 4096, value_name = "TOKENS", value_parser = clap::value_parser!(u16).range(1024..=8192))]
    context: u16,
    /// Items of each of the three tasks.
    #[arg(long, default_value_t = 16)]
    items: usize,
}

/// What `leank eval --json` tells of a mask.
#[derive(Deserialize)]
struct Measured {
    kept_v: f64,
    whole_kv_ratio: f64,
    text: Text,
    tasks: Vec<Task>,
}

#[derive(Deserialize)]
struct Text {
    kl: f64,
    dense_perplexity: f64,
    lean_perplexity: f64,
}

#[derive(Deserialize)]
struct Task {
    task: String,
    items: usize,
    dense_right: usize,
    lean_right: usize,
}

/// What `leank generate --json` tells.
#[derive(Deserialize)]
struct Generated {
    prompt_tokens: usize,
    tokens_per_second: f64,
}

/// `globals` are the flags of every command, as this one got them.
pub(crate) fn run(args: &Args, globals: Vec<OsString>) -> anyhow::Result<()> {
    target::make_folder("--out", &args.out)?;
    check_own(&args.out)?;
    let tour = Tour { args, globals };
    tour.unpack()?;
    tour.learn()?;
    let measured = tour.measure()?;
    let timed = tour.time()?;
    tour.report()?;
    print(args, &measured, &timed)
}

/// Refuses a folder that holds something else than an earlier demo.
fn check_own(folder: &Path) -> anyhow::Result<()> {
    let is_empty = std::fs::read_dir(folder).is_ok_and(|mut entries| entries.next().is_none());
    let is_ours = |(name, bytes): &(&str, &[u8])| {
        std::fs::read(folder.join("model").join(name)).is_ok_and(|found| found == *bytes)
    };
    anyhow::ensure!(
        is_empty || MODEL.iter().all(is_ours),
        "--out: {}: holds something else than a demo of this leank; give a new folder, or remove it",
        folder.display()
    );
    Ok(())
}

struct Tour<'a> {
    args: &'a Args,
    globals: Vec<OsString>,
}

impl Tour<'_> {
    fn path(&self, name: impl AsRef<Path>) -> PathBuf {
        self.args.out.join(name)
    }

    fn mask(&self, name: &str) -> PathBuf {
        self.path(format!("{name}.safetensors"))
    }

    /// The model and the texts, as files that every command can read.
    fn unpack(&self) -> anyhow::Result<()> {
        target::make_folder("--out", &self.path("model"))?;
        for (name, bytes) in MODEL {
            write_atomic(&self.path("model").join(name), bytes)?;
        }
        let prompt = &MEASURE[..MEASURE.floor_char_boundary(PROMPT_BYTES)];
        for (name, text) in [("learn.txt", LEARN), ("measure.txt", MEASURE), ("prompt.txt", prompt)]
        {
            write_atomic(&self.path(name), text.as_bytes())?;
        }
        Ok(())
    }

    fn learn(&self) -> anyhow::Result<()> {
        let mut dump = Words::new("dump").path("--model", &self.path("model"));
        dump = dump.path("--text", &self.path("learn.txt")).words(&["--sequences", "12"]);
        self.run(dump.path("--out", &self.path("dump")).words(&["--overwrite"]))?;
        for (name, _, how) in MASKS {
            let learn = Words::new("learn").value(self.path("dump")).words(how);
            self.run(learn.words(&["--align", "8"]).path("--out", &self.mask(name)))?;
        }
        Ok(())
    }

    /// Measurements in the order of the masks.
    fn measure(&self) -> anyhow::Result<Vec<Measured>> {
        let mut eval = Words::new("eval").path("--model", &self.path("model")).words(&["--mask"]);
        for (name, ..) in MASKS {
            eval = eval.value(self.mask(name));
        }
        eval = eval.path("--text", &self.path("measure.txt"));
        eval = eval.words(&["--context"]).value(self.args.context.to_string());
        eval = eval.words(&["--sequences", "4", "--tasks", "passkey,needle,multikey"]);
        eval = eval.words(&["--items"]).value(self.args.items.to_string());
        self.read(eval.words(&["--json"]), Some("eval.json"))
    }

    /// Speed of decoding without a mask and with each.
    fn time(&self) -> anyhow::Result<Vec<Generated>> {
        let masks =
            std::iter::once(None).chain(MASKS.iter().map(|(name, ..)| Some(self.mask(name))));
        let time = |mask: Option<PathBuf>| {
            let mut generate = Words::new("generate").path("--model", &self.path("model"));
            if let Some(mask) = mask {
                generate = generate.path("--mask", &mask);
            }
            generate = generate.path("--prompt-file", &self.path("prompt.txt"));
            self.read(
                generate.words(&["--tokens"]).value(TIMED.to_string()).words(&["--json"]),
                None,
            )
        };
        masks.map(time).collect()
    }

    fn report(&self) -> anyhow::Result<()> {
        let (shown, other) = SHOWN;
        let mut report = Words::new("report").path("--mask", &self.mask(shown));
        report = report.path("--dump", &self.path("dump")).path("--eval", &self.path("eval.json"));
        report = report.path("--compare", &self.mask(other));
        self.run(report.path("--out", &self.path("report.html")))
    }

    fn command(&self, words: &Words) -> anyhow::Result<Command> {
        output::note(format_args!("\n$ {words}"));
        let own = std::env::current_exe().context("this command does not know where it is")?;
        let mut command = Command::new(own);
        command.args(&words.0).args(&self.globals);
        Ok(command)
    }

    fn run(&self, words: Words) -> anyhow::Result<()> {
        let status = self.command(&words)?.status();
        let status = status.with_context(|| format!("`{words}` could not be started"))?;
        // What it was has been said by the command itself.
        anyhow::ensure!(status.success(), "`{words}` failed");
        Ok(())
    }

    /// Runs a command and reads the JSON that it prints; it is kept under a name too.
    fn read<T: DeserializeOwned>(&self, words: Words, name: Option<&str>) -> anyhow::Result<T> {
        let printed = self.command(&words)?.stderr(Stdio::inherit()).output();
        let printed = printed.with_context(|| format!("`{words}` could not be started"))?;
        anyhow::ensure!(printed.status.success(), "`{words}` failed");
        if let Some(name) = name {
            write_atomic(&self.path(name), &printed.stdout)?;
        }
        serde_json::from_slice(&printed.stdout)
            .with_context(|| format!("`{words}` printed something else than expected"))
    }
}

/// The words of a command behind `leank`.
struct Words(Vec<OsString>);

impl Words {
    fn new(command: &str) -> Self {
        Self(vec![command.into()])
    }

    fn words(mut self, words: &[&str]) -> Self {
        self.0.extend(words.iter().map(Into::into));
        self
    }

    fn value(mut self, value: impl Into<OsString>) -> Self {
        self.0.push(value.into());
        self
    }

    fn path(self, option: &str, path: &Path) -> Self {
        self.words(&[option]).value(path)
    }
}

impl Display for Words {
    /// As one would type it.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "leank")?;
        for word in &self.0 {
            let word = word.to_string_lossy();
            if word.contains(char::is_whitespace) {
                write!(f, " '{word}'")?;
            } else {
                write!(f, " {word}")?;
            }
        }
        Ok(())
    }
}

fn print(args: &Args, measured: &[Measured], timed: &[Generated]) -> anyhow::Result<()> {
    let ([dense, lean @ ..], [first, ..]) = (timed, measured) else { return Ok(()) };
    let columns = ["cache", "bytes", "V kept", "KL", "perplexity"].into_iter();
    let tasks = first.tasks.iter().map(|task| task.task.as_str());
    let mut table = output::table(columns.chain(tasks).chain(["tokens/s", "speed"]));
    if let Some(names) = table.column_mut(0) {
        names.set_cell_alignment(comfy_table::CellAlignment::Left);
    }
    let mut row = vec!["everything kept".to_owned(), output::percent(1.0), output::percent(1.0)];
    row.extend(["0".to_owned(), format!("{:.2}", first.text.dense_perplexity)]);
    row.extend(first.tasks.iter().map(|task| format!("{} of {}", task.dense_right, task.items)));
    row.extend([format!("{:.0}", dense.tokens_per_second), "×1.00".to_owned()]);
    table.add_row(row);
    for (((_, words, _), own), timed) in MASKS.iter().zip(measured).zip(lean) {
        let mut row = vec![(*words).to_owned(), output::percent(own.whole_kv_ratio)];
        row.push(output::percent(own.kept_v));
        row.extend([format!("{:.4}", own.text.kl), format!("{:.2}", own.text.lean_perplexity)]);
        row.extend(own.tasks.iter().map(|task| format!("{} of {}", task.lean_right, task.items)));
        let speed = timed.tokens_per_second / dense.tokens_per_second;
        row.extend([format!("{:.0}", timed.tokens_per_second), format!("×{speed:.2}")]);
        table.add_row(row);
    }
    output::line(format!("\n{table}"))?;
    output::line(format!(
        "\nbytes: of the whole cache at {} tokens, sink and recent window included; KL in nats per token against\n\
         everything kept; facts found in {} tokens; speed of one sequence behind a prompt of {} tokens, on this\n\
         machine. Norms of q and k keep what is large, also where it is the same for every key, and lose what tells\n\
         keys apart.\n\
         \nLook at {}, then take your own model: `leank dump --help`.",
        args.context,
        args.context,
        dense.prompt_tokens,
        args.out.join("report.html").display(),
    ))
}
