//! A folder with a model and texts, and the command run in it.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
};

use serde_json::Value;

use crate::{messages, model::Tiny};

/// What a dump of the tests is made with.
pub(crate) const DUMP: &str = "dump --model model --text text.txt --sequences 4 --positions 8 \
    --prefix 60..90 --retrieval 0 --out dump";

/// What learning from it is done with, but for the budget and the mask's name.
pub(crate) const LEARN: &str = "learn dump --align 4 --step 4 --sink 4 --recent 8";

/// A folder to run `leank` in.
pub(crate) struct World {
    folder: tempfile::TempDir,
}

/// What a run left.
#[derive(Debug)]
pub(crate) struct Outcome {
    pub(crate) code: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl World {
    /// With a model in `model` and two texts, `text.txt` and `other.txt`.
    pub(crate) fn new() -> Self {
        Self::with_model(Tiny::default())
    }

    pub(crate) fn with_model(model: Tiny) -> Self {
        let world = Self { folder: tempfile::tempdir().unwrap() };
        model.write_folder(&world.path("model"));
        world.write("text.txt", text(3000, 1));
        world.write("other.txt", text(2000, 2));
        world
    }

    /// With a dump in `dump` too.
    pub(crate) fn with_dump() -> Self {
        let world = Self::new();
        world.done(DUMP);
        world
    }

    /// With a dump and a mask of half the channels, `mask.safetensors`.
    pub(crate) fn with_mask() -> Self {
        let world = Self::with_dump();
        world.done(&format!("{LEARN} --k-ratio 0.5 --out mask.safetensors"));
        world
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub(crate) fn write(&self, name: &str, bytes: impl AsRef<[u8]>) {
        fs::write(self.path(name), bytes).unwrap();
    }

    pub(crate) fn read(&self, name: &str) -> Vec<u8> {
        fs::read(self.path(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
    }

    /// The command, with arguments that hold no spaces.
    pub(crate) fn command(&self, arguments: &str) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_leank"));
        command
            .args(arguments.split_whitespace())
            .current_dir(self.folder.path())
            .stdin(Stdio::null());
        // What would change how messages look.
        for variable in ["COLUMNS", "LINES", "CLICOLOR", "CLICOLOR_FORCE", "NO_COLOR"] {
            command.env_remove(variable);
        }
        command
    }

    pub(crate) fn run(&self, arguments: &str) -> Outcome {
        Outcome::new(self.command(arguments).output().unwrap())
    }

    /// Runs what must succeed; its standard output.
    pub(crate) fn done(&self, arguments: &str) -> String {
        let outcome = self.run(arguments);
        assert_eq!(outcome.code, Some(0), "{arguments}: {outcome:?}");
        outcome.stdout
    }

    /// Runs what must succeed and print JSON.
    pub(crate) fn json(&self, arguments: &str) -> Value {
        let text = self.done(arguments);
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("{arguments}: {error}: {text}"))
    }

    /// Runs what must fail: exit code 1, one message with all of `words` in it, and not a file
    /// more, less or changed than before.
    pub(crate) fn fails(&self, arguments: &str, words: &[&str]) {
        let before = self.files();
        let outcome = self.run(arguments);
        outcome.assert_failed(words);
        messages::check(arguments, &outcome.stderr, self.folder.path());
        assert_eq!(self.files(), before, "{arguments}");
    }

    /// Every file and folder, with the size of files, but for the records in `learn`, which are
    /// there to be left by a failed run, and to be whole.
    pub(crate) fn files(&self) -> BTreeMap<PathBuf, u64> {
        let mut files = BTreeMap::new();
        visit(self.folder.path(), &mut |path, metadata| {
            let records = path.components().any(|part| part.as_os_str() == "learn");
            if !records {
                files.insert(path.to_owned(), if metadata.is_file() { metadata.len() } else { 0 });
            }
        });
        files
    }
}

impl Outcome {
    pub(crate) fn new(output: Output) -> Self {
        Self {
            code: output.status.code(),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }

    /// One message on standard error with all of `words` in it and nothing twice, exit code 1.
    pub(crate) fn assert_failed(&self, words: &[&str]) {
        // Read the messages with `--no-capture`.
        print!("{}", self.stderr);
        let stderr = &self.stderr;
        assert_eq!(self.code, Some(1), "{self:?}");
        assert_eq!(self.stdout, "", "{stderr}");
        assert!(stderr.starts_with("leank: ") && stderr.ends_with('\n'), "{stderr}");
        assert_eq!(stderr.lines().count(), 1, "{stderr}");
        assert!(!stderr.contains("panicked at"), "{stderr}");
        assert!(stderr.matches("(os error").count() <= 1, "says the reason twice: {stderr}");
        for word in words {
            assert!(stderr.contains(word), "no {word:?} in: {stderr}");
        }
    }
}

/// Calls `see` for everything below `folder`.
pub(crate) fn visit(folder: &Path, see: &mut impl FnMut(&Path, &fs::Metadata)) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let metadata = fs::metadata(&path).unwrap();
        see(&path, &metadata);
        if metadata.is_dir() {
            visit(&path, see);
        }
    }
}

/// `len` letters in words.
fn text(len: usize, seed: u64) -> String {
    let mut state = seed;
    let mut letter = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963);
        let n = (state >> 33) % 31;
        if n < 26 { char::from(b'a' + n as u8) } else { ' ' }
    };
    (0..len).map(|_| letter()).collect()
}
