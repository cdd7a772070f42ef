//! Files that are made to break leank, `attacks/` at the root of the repository: what takes such a file
//! refuses each by name, in bounded memory and time, and leaves nothing behind.

use std::{
    collections::BTreeSet,
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::Command,
    sync::Mutex,
    thread,
};

use leank::{
    Backend as _, Cache as _, CacheConfig, Dtype, HeadFormat, HostView, Layer, LeanFormat,
    ModelMask, ModelShape, StepEntry, ViewShape, Windows,
    candle::{LoadOptions, Model, Precision},
    cpu::{Cpu, CpuCache},
    files::{ReadOptions, ScalingFactors, read_mask},
    train::{
        dump::{Dump, HeadData},
        learn::{LearnOptions, recorded},
    },
};

use crate::world::{DUMP, LEARN, Outcome, World};

const ATTACKS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../attacks");

/// Memory that a command may ask for, in KiB, where `LEANK_ATTACK_MEMORY` does not say another limit (sanitizers
/// take terabytes). Two threads, the program and its libraries take half.
const MEMORY_KIB: u64 = 1 << 20;
/// Seconds of the processors that a command may take. It hangs after ten times as many by the clock.
const SECONDS: u64 = 60;

/// A row of the table in `attacks/README.md`.
#[derive(Debug)]
struct Attack {
    /// Folder and file.
    name: String,
    /// What the refusal must say; nothing of a file that is sound.
    words: Vec<String>,
}

impl Attack {
    fn path(&self) -> PathBuf {
        Path::new(ATTACKS).join(&self.name)
    }

    fn is_sound(&self) -> bool {
        self.words.is_empty()
    }

    /// The words, and the name of the file; `named` where the message can know it.
    fn told(&self, named: bool) -> Vec<&str> {
        let name = self.name.rsplit('/').next().filter(|_| named);
        self.words.iter().map(String::as_str).chain(name).collect()
    }

    #[track_caller]
    fn is_told_by(&self, message: &str, named: bool) {
        for word in self.told(named) {
            assert!(message.contains(word), "{}: no {word:?} in: {message}", self.name);
        }
    }
}

fn table() -> Vec<Attack> {
    let table = fs::read_to_string(Path::new(ATTACKS).join("README.md")).unwrap();
    let rows = table.lines().filter_map(|line| line.strip_prefix("| `"));
    let attack = |row: &str| {
        let (name, rest) = row.split_once("` | ").unwrap();
        let (_, words) = rest.trim_end_matches('|').rsplit_once(" | ").unwrap();
        let words = words.split('`').skip(1).step_by(2).map(str::to_owned).collect();
        Attack { name: name.to_owned(), words }
    };
    rows.map(attack).collect()
}

/// The attacks of a folder.
fn attacks(folder: &str) -> Vec<Attack> {
    let of_folder = |attack: &Attack| attack.name.split('/').next() == Some(folder);
    let found: Vec<_> = table().into_iter().filter(of_folder).collect();
    assert!(found.iter().any(|attack| !attack.is_sound()), "{folder}");
    found
}

#[test]
fn the_table_is_of_what_is_there() {
    let mut there = BTreeSet::new();
    for folder in fs::read_dir(ATTACKS).unwrap().map(|entry| entry.unwrap().path()) {
        for file in fs::read_dir(&folder).into_iter().flatten() {
            let name = file.unwrap().path();
            let name = name.strip_prefix(ATTACKS).unwrap().to_str().unwrap().to_owned();
            there.insert(name);
        }
    }
    let told: BTreeSet<_> = table().into_iter().map(|attack| attack.name).collect();
    assert_eq!(told, there);
}

/// Runs the command within bounds of memory and time.
fn bounded(world: &World, arguments: &str) -> Outcome {
    let memory = std::env::var("LEANK_ATTACK_MEMORY").unwrap_or_else(|_| MEMORY_KIB.to_string());
    let script = format!(
        "ulimit -v {memory}; ulimit -t {SECONDS}; exec timeout -s KILL {} \"$@\"",
        10 * SECONDS
    );
    let plain = world.command(arguments);
    let mut command = Command::new("sh");
    command.args(["-c", &script, "sh", env!("CARGO_BIN_EXE_leank"), "--threads", "2"]);
    command.args(plain.get_args()).current_dir(world.path("."));
    Outcome::new(command.stdin(std::process::Stdio::null()).output().unwrap())
}

/// Calls `work` for each, on as many threads as there are.
fn each<T: Send>(all: Vec<T>, work: impl Fn(T) + Sync) {
    let left = Mutex::new(all.into_iter());
    let threads = thread::available_parallelism().map_or(1, usize::from);
    thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    let next = left.lock().unwrap().next();
                    let Some(next) = next else { return };
                    work(next);
                }
            });
        }
    });
}

/// A world that has the attacks in `attacks`.
fn world() -> World {
    let world = World::with_mask();
    symlink(ATTACKS, world.path("attacks")).unwrap();
    world
}

/// Hands every attack of a folder to `read` and to the commands, in which `@` is its place. Sound files
/// are given to the first command only.
fn hold(folder: &str, read: impl Fn(&Path) -> Result<(), String> + Sync, commands: &[&str]) {
    let world = world();
    let before = world.files();
    let run = |attack: &Attack, command: &str| {
        bounded(&world, &command.replace('@', &format!("attacks/{}", attack.name)))
    };
    let (sound, attacks): (Vec<_>, Vec<_>) =
        attacks(folder).into_iter().partition(Attack::is_sound);
    each(attacks, |attack| {
        let message = read(&attack.path()).expect_err(&attack.name);
        attack.is_told_by(&message, true);
        for command in commands {
            run(&attack, command).assert_failed(&attack.told(true));
        }
    });
    assert_eq!(world.files(), before);
    for attack in sound {
        read(&attack.path()).unwrap_or_else(|error| panic!("{}: {error}", attack.name));
        let outcome = run(&attack, commands[0]);
        assert_eq!(outcome.code, Some(0), "{}: {outcome:?}", attack.name);
    }
    assert!(!Path::new("/tmp/leank-was-here").exists(), "code was run");
}

fn message<T>(result: Result<T, impl std::fmt::Display>) -> Result<(), String> {
    result.map(drop).map_err(|error| error.to_string())
}

fn a_mask(path: &Path) -> Result<(), String> {
    message(read_mask(path, &ReadOptions::default()))
}

const MASK_COMMANDS: [&str; 8] = [
    "inspect @",
    "plan --mask @",
    "convert @ out.safetensors",
    "convert @ out.npy",
    "shard @ --world 1 --out ranks",
    "report --mask @ --out out.html",
    "generate --model model --prompt a --tokens 1 --mask @",
    "eval --model model --mask @ --text text.txt --context 100 --positions 8 --sequences 1",
];

#[test]
fn native_masks() {
    hold("mask_native", a_mask, &MASK_COMMANDS);
}

#[test]
fn torch_masks() {
    hold("mask_pth", a_mask, &MASK_COMMANDS);
}

#[test]
fn numpy_masks() {
    hold("mask_npy", a_mask, &MASK_COMMANDS);
}

#[test]
fn tables_of_scaling_factors() {
    let shape = ModelShape::new(1, 1, 1, 4).unwrap();
    let scaling = Some(ScalingFactors { shape, ratio: 0.5, alignment: 1 });
    let read = |path: &Path| message(read_mask(path, &ReadOptions { scaling }));
    hold("mask_tsv", read, &["convert @ out.safetensors --shape 1,1,4 --ratio 0.5 --align 1"]);
}

fn a_model(path: &Path) -> Result<(), String> {
    message(Model::load(path, LoadOptions::with_precision(Precision::AsStored)))?;
    message(Model::load(path, LoadOptions::default()))
}

const MODEL_COMMANDS: [&str; 4] = [
    "generate --model @ --prompt a --tokens 1",
    "generate --model @ --prompt a --tokens 1 --mask mask.safetensors",
    "dump --model @ --text text.txt --sequences 1 --positions 8 --prefix 10..20 --retrieval 0 --out d",
    "check --model @ --mask mask.safetensors --text text.txt --context 40 --positions 8",
];

#[test]
fn gguf_models() {
    hold("gguf", a_model, &MODEL_COMMANDS);
}

#[test]
fn models_in_folders() {
    hold("models", a_model, &MODEL_COMMANDS);
}

/// Opens a dump and reads all that is in it.
fn a_dump(path: &Path) -> Result<(), String> {
    let read = || -> leank::train::Result<()> {
        let dump = Dump::open(path)?;
        let (shape, sequences) = (dump.manifest().shape, dump.manifest().sequences.len());
        let mut data = HeadData::default();
        for layer in shape.layer_indices() {
            let layer = dump.layer(layer)?;
            for head in shape.kv_head_indices() {
                (0..sequences).try_for_each(|at| layer.read(head, at, &mut data))?;
            }
        }
        Ok(())
    };
    message(read())
}

#[test]
fn dumps() {
    let learn =
        "learn @ --k-ratio 0.5 --align 4 --step 4 --sink 1 --recent 1 --records learn --out x.npy";
    let e1 = format!("{learn} --method e1");
    let layers = "learn @ --layers 0..1 --align 4 --step 4 --sink 1 --recent 1 --records learn";
    hold("dumps", a_dump, &[learn, &e1, layers]);
}

#[test]
fn evaluations() {
    let world = world();
    each(attacks("evaluation"), |attack| {
        let file = format!("attacks/{}", attack.name);
        let report = format!("report --mask mask.safetensors --eval {file} --out out.html");
        bounded(&world, &report).assert_failed(&attack.told(true));
    });
}

#[test]
fn texts() {
    let world = world();
    each(attacks("text"), |attack| {
        let file = format!("attacks/{}", attack.name);
        for arguments in [
            format!(
                "{} --text {file}",
                DUMP.replace("--text text.txt", "").replace("--out dump", "--out d")
            ),
            format!("eval --model model --mask mask.safetensors --text {file} --context 40"),
            format!("check --model model --mask mask.safetensors --text {file} --context 40"),
            format!("generate --model model --prompt-file {file}"),
        ] {
            bounded(&world, &arguments).assert_failed(&attack.told(true));
        }
    });
}

#[test]
fn long_texts() {
    let world = world();
    world.write("long.txt", "a".repeat((4 << 20) + 1));
    for arguments in [
        DUMP.replace("text.txt", "long.txt").replace("--out dump", "--out d"),
        "eval --model model --mask mask.safetensors --text long.txt --context 40".to_owned(),
        "generate --model model --prompt-file long.txt".to_owned(),
    ] {
        bounded(&world, &arguments).assert_failed(&["long.txt", "larger than 4194304 bytes"]);
    }
}

/// The record of layer 0 that learning from `dump` left, within the world.
fn a_record(world: &World) -> String {
    let mut records = fs::read_dir(world.path("dump/learn")).unwrap();
    let folder = records.next().unwrap().unwrap().file_name().into_string().unwrap();
    format!("dump/learn/{folder}/layer-000.json")
}

#[test]
fn records() {
    let world = world();
    let place = a_record(&world);
    let folder = place.rsplit_once('/').unwrap().0;
    let sound = world.read(&place);
    for attack in attacks("record") {
        world.write(&place, fs::read(attack.path()).unwrap());
        let learn = format!("{LEARN} --k-ratio 0.5 --out x.safetensors");
        let mut words = attack.told(false);
        words.push("layer-000.json");
        bounded(&world, &learn).assert_failed(&words);
        // Of a record it asks only what it needs; what is in it, who learns from it.
        let merged = bounded(&world, &format!("merge {folder} --out merged"));
        if merged.code != Some(0) {
            merged.assert_failed(&["layer-000.json"]);
        }
        let _ = fs::remove_dir_all(world.path("merged"));
    }
    world.write(&place, sound);
    world.done(&format!("{LEARN} --k-ratio 0.5 --out x.safetensors"));
}

/// The cache that `attacks/saved_sequence` is of.
fn cache() -> CpuCache {
    let shape = ModelShape::new(1, 1, 1, 4).unwrap();
    let plain = LeanFormat::Plain(Dtype::F16);
    let config = CacheConfig::new(shape, ModelMask::dense(&shape)).unwrap();
    let config = CacheConfig {
        dtype: Dtype::F16,
        formats: Some(vec![HeadFormat { k: plain, v: plain }]),
        windows: Windows { sink: 32, recent: 128 },
        block: 64,
        ..config
    };
    Cpu::new().create(config).unwrap()
}

#[test]
fn saved_sequences() {
    for attack in attacks("saved_sequence") {
        let bytes = fs::read(attack.path()).unwrap();
        let mut cache = cache();
        let result = message(cache.restore(&mut &bytes[..]));
        if attack.is_sound() {
            result.unwrap_or_else(|error| panic!("{}: {error}", attack.name));
        } else {
            attack.is_told_by(&result.expect_err(&attack.name), false);
            assert_eq!(cache.memory().used_bytes(), 0, "{}", attack.name);
        }
    }
}

/// Cuts a file at every byte; `read` must refuse what is left, except where `spare` bytes or fewer are
/// missing.
fn cut(path: &Path, spare: usize, named: bool, read: impl Fn() -> Result<(), String>) {
    let whole = fs::read(path).unwrap();
    read().unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let name = path.file_name().unwrap().to_str().unwrap();
    for end in (0..whole.len()).rev() {
        let file = fs::File::options().write(true).open(path).unwrap();
        file.set_len(end as u64).unwrap();
        match read() {
            Ok(()) => assert!(end + spare >= whole.len(), "{name}, {end} bytes of it"),
            Err(message) => assert!(!named || message.contains(name), "{end}: {message}"),
        }
    }
    fs::write(path, whole).unwrap();
}

#[test]
fn sound_files_cut_at_every_byte() {
    let world = World::with_mask();
    for attack in attacks("gguf").into_iter().filter(Attack::is_sound) {
        let path = world.path("cut.gguf");
        fs::copy(attack.path(), &path).unwrap();
        // Behind the last tensor there is padding.
        cut(&path, 31, true, || a_model(&path));
    }
    for (kind, files, read) in [
        (
            "models",
            &["config.json", "tokenizer.json", "model.safetensors"][..],
            a_model as fn(&Path) -> _,
        ),
        ("dumps", &["manifest.json", "layer-000.safetensors"], a_dump),
    ] {
        let folder = world.path(kind);
        fs::create_dir(&folder).unwrap();
        for file in files {
            fs::copy(Path::new(ATTACKS).join(kind).join("sound").join(file), folder.join(file))
                .unwrap();
        }
        for file in files {
            cut(&folder.join(file), 0, true, || read(&folder));
        }
    }
    let dump = Dump::open(&world.path("dump")).unwrap();
    let windows = Windows { sink: 4, recent: 8 };
    let options = LearnOptions { windows, step: 4, threads: 1, ..LearnOptions::default() };
    cut(&world.path(&a_record(&world)), 0, true, || match recorded(&dump, &options) {
        Ok(curves) => curves.map(drop).ok_or("there is no record".into()),
        Err(error) => Err(error.to_string()),
    });

    let mut cache = cache();
    let sequence = cache.add_sequence();
    cache.plan(&[StepEntry::store(sequence, 300)]).unwrap();
    let rows = vec![0.5f32; 300 * 4];
    let view = HostView::new(&rows[..], ViewShape::contiguous(300, 1, 4)).unwrap();
    cache.append(Layer(0), view, view).unwrap();
    cache.commit().unwrap();
    let mut saved = Vec::new();
    cache.save(sequence, &mut saved).unwrap();
    cache.release(sequence).unwrap();
    for end in 0..saved.len() {
        assert!(cache.restore(&mut &saved[..end]).is_err(), "{end} bytes of it");
        assert_eq!(cache.memory().used_bytes(), 0);
    }
    cache.restore(&mut &saved[..]).unwrap();
}

/// What may stand in the place of a file.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Thing {
    Loop,
    Dangling,
    Folder,
    Device,
    Pipe,
}

impl Thing {
    fn put(self, path: &Path) {
        match self {
            Self::Loop => symlink(path, path).unwrap(),
            Self::Dangling => symlink("nothing-is-here", path).unwrap(),
            Self::Folder => fs::create_dir(path).unwrap(),
            Self::Device => symlink("/dev/zero", path).unwrap(),
            // Nobody ever writes to it.
            Self::Pipe => assert!(Command::new("mkfifo").arg(path).status().unwrap().success()),
        }
    }
}

#[test]
fn what_is_no_file_in_the_place_of_one() {
    use Thing::{Dangling, Device, Folder, Loop, Pipe};
    let world = World::with_mask();
    let record = a_record(&world);
    let merge = format!("merge {} --out merged", record.rsplit_once('/').unwrap().0);
    let learn = format!("{LEARN} --k-ratio 0.5 --out x.safetensors");
    let dump = DUMP.replace("--out dump", "--out d");
    let of_model = dump.replace("--model model", "--model x.gguf");
    let of_text = dump.replace("text.txt", "x.txt");
    let eval = "eval --model model --mask mask.safetensors --text x.txt --context 40";
    let report = "report --mask mask.safetensors --eval x.json --out x.html";
    let generate = "generate --model model --prompt a --tokens 1";
    let every = &[Loop, Dangling, Folder, Device, Pipe][..];
    // A text or an evaluation may come through a pipe.
    let no_pipe = &[Loop, Dangling, Folder, Device][..];
    // What leads nowhere is not there.
    let there = &[Folder, Device, Pipe][..];
    for (place, things, arguments) in [
        ("x.safetensors", every, "inspect x.safetensors"),
        ("x.pth", every, "plan --mask x.pth"),
        ("x.npy", every, "convert x.npy y.pth"),
        ("x.tsv", every, "convert x.tsv y.npy --shape 1,1,4"),
        ("x.pt", every, "report --mask x.pt --out x.html"),
        ("x.gguf", &[Loop, Dangling, Device, Pipe], "generate --model x.gguf --prompt a"),
        ("x.gguf", &[Loop, Dangling, Device, Pipe], &of_model),
        ("model/config.json", every, generate),
        ("model/tokenizer.json", every, generate),
        ("model/model.safetensors", every, generate),
        ("model/model.safetensors.index.json", there, generate),
        ("x.txt", no_pipe, &of_text),
        ("x.txt", no_pipe, eval),
        ("x.txt", no_pipe, "generate --model model --prompt-file x.txt"),
        ("x.json", no_pipe, report),
        ("dump/manifest.json", every, &learn),
        ("dump/layer-001.safetensors", every, &learn),
        (&record, &[Loop, Folder, Device, Pipe], &learn),
        (&record, &[Loop, Device, Pipe], &merge),
    ] {
        let (path, aside) = (world.path(place), world.path("aside"));
        let was_there = path.exists();
        if was_there {
            fs::rename(&path, &aside).unwrap();
        }
        for thing in things {
            println!("{thing:?} at {place}: {arguments}");
            thing.put(&path);
            bounded(&world, arguments).assert_failed(&[place.rsplit('/').next().unwrap()]);
            match thing {
                Folder => fs::remove_dir(&path).unwrap(),
                _ => fs::remove_file(&path).unwrap(),
            }
        }
        if was_there {
            fs::rename(&aside, &path).unwrap();
        }
    }
    world.done(&learn);
    world.done(generate);
}

/// A text through a pipe, which can be read once only: what is told of it is what was read.
#[test]
fn a_text_through_a_pipe() {
    let world = World::new();
    world.done(&DUMP.replace("--out dump", "--out plain"));
    let script = format!(
        "cat text.txt | {} {}",
        env!("CARGO_BIN_EXE_leank"),
        DUMP.replace("text.txt", "/dev/stdin").replace("--out dump", "--out piped")
    );
    let mut command = Command::new("sh");
    let outcome = command.args(["-c", &script]).current_dir(world.path(".")).output().unwrap();
    assert!(outcome.status.success(), "{outcome:?}");
    let sums = |name: &str| {
        let manifest = Dump::open(&world.path(name)).unwrap().manifest().clone();
        let sums = manifest.run.unwrap().inputs_of("text").map(|own| own.sha256.clone()).collect();
        let sums: Vec<String> = sums;
        assert_eq!(sums.len(), 1);
        sums
    };
    assert_eq!(sums("plain"), sums("piped"));
}
