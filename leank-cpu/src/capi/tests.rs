//! The boundary from inside: what C cannot see, or must never do. What C does see is tested in C
//! (`tests/capi.c`, run by `tools/capi.sh`).

use std::{
    ffi::{CStr, CString, c_void},
    fmt::Write as _,
    panic::{AssertUnwindSafe, catch_unwind},
    path::PathBuf,
    process::Command,
    ptr,
    sync::atomic::{AtomicUsize, Ordering},
    time::Duration,
};

use leank_core::{
    Backend as _, Cache as _, CacheConfig, ChannelMask, Dtype, Error, HostView, HostViewMut, Layer,
    ModelMask, ModelShape, StepEntry, ViewShape,
};

use super::{
    backend::*,
    cache::*,
    callback::{Injected, Piece, Run},
    config::*,
    leank_version,
    mask::*,
    memory::Options,
    status::*,
};
use crate::{Cpu, Executor as _, Isa};

fn last_error() -> String {
    // SAFETY: it ends with a NUL, and is read before the next call.
    unsafe { CStr::from_ptr(leank_last_error()) }.to_string_lossy().into_owned()
}

/// The header declares the structs, with each field where Rust has it, and the numbers.
#[test]
fn the_header_agrees() {
    let mut source = "#include <leank.h>\n".to_owned();
    let mut holds = |what: String| writeln!(source, "_Static_assert({what}, \"\");").unwrap();
    for (name, size, fields) in [
        BackendOptions::LAYOUT,
        Kept::LAYOUT,
        MaskInfo::LAYOUT,
        Format::LAYOUT,
        Config::LAYOUT,
        Footprint::LAYOUT,
        Entry::LAYOUT,
        View::LAYOUT,
        ViewMut::LAYOUT,
        Memory::LAYOUT,
    ] {
        holds(format!("sizeof({name}) == {size}"));
        for (field, offset, size) in fields {
            holds(format!("offsetof({name}, {field}) == {offset}"));
            holds(format!("sizeof((({name} *)0)->{field}) == {size}"));
        }
    }
    for (status, name) in Status::ALL {
        holds(format!("{} == {}", name.to_str().unwrap(), *status as i32));
    }
    for (name, number) in
        [("LEANK_F32", Dtype::F32), ("LEANK_F16", Dtype::F16), ("LEANK_BF16", Dtype::Bf16)]
    {
        let found = (0..3).find(|&n| dtype("", n).unwrap() == number).unwrap();
        holds(format!("{name} == {found}"));
    }
    holds(format!("LEANK_AUTO == {AUTO}u && LEANK_EVERYTHING == {}u", usize::MAX));
    holds(format!("LEANK_NO_LIMIT == {NO_LIMIT}u"));
    holds(format!("LEANK_MAX_TOKENS == {}", leank_core::blocks::MAX_TOKENS));
    holds("sizeof(leank_status) == 4 && sizeof(leank_dtype) == 4".into());

    let dir = TempDir::new("header");
    let file = dir.0.join("layout.c");
    std::fs::write(&file, source).unwrap();
    let include = concat!("-I", env!("CARGO_MANIFEST_DIR"), "/include");
    // Rust links with this compiler, so it is there wherever this was built.
    let compiled =
        Command::new("cc").args(["-std=c11", "-fsyntax-only", include]).arg(&file).output();
    let compiled = compiled.unwrap();
    assert!(compiled.status.success(), "{}", String::from_utf8_lossy(&compiled.stderr));
}

#[test]
fn panics_become_a_status() {
    assert_eq!(call(|| panic!("number {}", 7)), Status::Internal);
    assert!(last_error().contains("number 7"), "{}", last_error());
    assert_eq!(call(|| std::panic::panic_any(3)), Status::Internal);
    assert_eq!(call(|| Err(leank_core::Error::invalid("a\0b", "c").into())), Status::Invalid);
    assert_eq!(last_error(), "invalid a\u{fffd}b: c");
    // Success leaves it, and other threads have their own.
    assert_eq!(call(|| Ok(())), Status::Ok);
    assert_eq!(last_error(), "invalid a\u{fffd}b: c");
    assert_eq!(std::thread::spawn(last_error).join().unwrap(), "");
}

const TOKENS: usize = 2048;
const SHAPE: (usize, usize, usize) = (4, 2, 64);
const CHUNK: usize = 256;

fn numbers(seed: usize, len: usize) -> Vec<f32> {
    (0..len).map(|i| ((seed * 7919 + i * 104_729) % 2003) as f32 / 1000.0 - 1.0).collect()
}

fn view(data: &[f32], tokens: usize, heads: usize) -> View {
    let (data, head_dim) = (data.as_ptr().cast(), SHAPE.2);
    View {
        data,
        dtype: 0,
        tokens,
        heads,
        head_dim,
        token_stride: heads * head_dim,
        head_stride: head_dim,
    }
}

fn view_mut(data: &mut [f32], tokens: usize, heads: usize) -> ViewMut {
    let View { dtype, tokens, heads, head_dim, token_stride, head_stride, .. } =
        view(data, tokens, heads);
    let data = data.as_mut_ptr().cast();
    ViewMut { data, dtype, tokens, heads, head_dim, token_stride, head_stride }
}

/// What a call answers.
macro_rules! abi {
    ($call:expr) => {{
        // SAFETY: every pointer in these tests is NULL or points to what the header asks for.
        unsafe { $call }
    }};
}

#[test]
fn errors_have_their_status() {
    let of = |error: Error| (call(|| Err(error.into())), leank_last_error_bytes());
    let system = Error::SystemMemory { what: "blocks", bytes: 70 };
    assert_eq!(of(system), (Status::SystemMemory, 70));
    let limit = Error::OutOfMemory { needed: 9, available: 4, missing: 5, limit: 8 };
    assert_eq!(of(limit), (Status::MemoryLimit, 5));
    let device =
        Error::Device { device: "gpu".into(), action: "copying", why: "it is gone".into() };
    assert_eq!(of(device), (Status::Internal, 0));
    let other = Error::OtherModel {
        field: "head_dim",
        expected: "64".into(),
        found: "128".into(),
        model: "mine".into(),
    };
    assert_eq!(of(other), (Status::Mismatch, 0));
}

#[test]
fn the_version_is_that_of_the_crate() {
    let version = leank_version();
    assert!(!version.is_null());
    assert_eq!(abi!(CStr::from_ptr(version)).to_str().unwrap(), env!("CARGO_PKG_VERSION"));
}

/// Of a pool that would start as many there is no test.
#[test]
fn so_many_threads_and_no_more() {
    let mut backend = ptr::null_mut();
    for (threads, status) in [(1024, Status::Ok), (1025, Status::Invalid)] {
        let options = BackendOptions { threads, run: Some(shared), ..Options::defaults() };
        assert_eq!(abi!(leank_backend_create(&options, &mut backend)), status);
        abi!(leank_backend_free(backend));
    }
}

/// Kept channels of the two heads.
fn kept() -> [Vec<u16>; 2] {
    [(0..10).collect(), (20..40).collect()]
}

/// A cache of one layer on an executor, a sequence in it, and what comes in and goes out.
struct Scene {
    cache: *mut Handle,
    sequence: u64,
    k: Vec<f32>,
    q: Vec<f32>,
    out: Vec<f32>,
}

impl Scene {
    fn new(isa: Isa, run: Option<Run>, user: *mut c_void) -> Self {
        let (query_heads, kv_heads, head_dim) = SHAPE;
        let (counts, channels) = (kept().map(|kept| kept.len() as u32), kept().concat());
        let kept = Kept {
            layers: 1,
            kv_heads,
            head_dim,
            counts: counts.as_ptr(),
            counts_len: counts.len(),
            channels: channels.as_ptr(),
            channels_len: channels.len(),
        };
        let isa = CString::new(isa.to_string()).unwrap();
        let options =
            BackendOptions { threads: 2, isa: isa.as_ptr(), run, user, ..Options::defaults() };
        let (mut backend, mut mask, mut cache) =
            (ptr::null_mut(), ptr::null_mut(), ptr::null_mut());
        assert_eq!(abi!(leank_backend_create(&options, &mut backend)), Status::Ok);
        assert_eq!(abi!(leank_mask_create(&kept, &mut mask)), Status::Ok);
        let config =
            Config { layers: 1, query_heads, kv_heads, head_dim, mask, ..Options::defaults() };
        assert_eq!(abi!(leank_cache_create(backend, &config, &mut cache)), Status::Ok);
        abi!(leank_mask_free(mask));
        abi!(leank_backend_free(backend));
        let mut sequence = 0;
        assert_eq!(abi!(leank_cache_add_sequence(cache, &mut sequence)), Status::Ok);
        let (k, q) = (numbers(1, TOKENS * kv_heads * head_dim), numbers(2, query_heads * head_dim));
        let mut scene = Self { cache, sequence, k, out: vec![0.0; q.len()], q };
        // In steps too small for threads: only `attend` is to need them.
        for start in (0..TOKENS).step_by(CHUNK) {
            scene.append(start, CHUNK.min(TOKENS - start), 0);
            assert_eq!(abi!(leank_cache_commit(cache)), Status::Ok);
        }
        scene.append(0, 1, 1);
        scene
    }

    /// Plans a step, and appends rows from `start` on.
    fn append(&mut self, start: usize, tokens: usize, attend: i32) {
        let entry = Entry { sequence: self.sequence, tokens, attend };
        let k = view(&self.k[start * SHAPE.1 * SHAPE.2..], tokens, SHAPE.1);
        assert_eq!(abi!(leank_cache_plan(self.cache, &entry, 1)), Status::Ok);
        assert_eq!(abi!(leank_cache_append(self.cache, 0, &k, &k)), Status::Ok);
    }

    fn attend(&mut self) -> Status {
        let (q, out) = (view(&self.q, 1, SHAPE.0), view_mut(&mut self.out, 1, SHAPE.0));
        abi!(leank_cache_attend(self.cache, 0, &q, &out))
    }
}

impl Drop for Scene {
    fn drop(&mut self) {
        abi!(leank_cache_free(self.cache));
    }
}

/// The same through the Rust API.
fn in_rust(isa: Isa, scene: &Scene) -> Vec<f32> {
    let (query_heads, kv_heads, head_dim) = SHAPE;
    let shape = ModelShape::new(1, query_heads, kv_heads, head_dim).unwrap();
    let heads = kept().map(|kept| ChannelMask::new(head_dim, kept).unwrap()).to_vec();
    let mask = ModelMask::new(1, kv_heads, head_dim, heads).unwrap();
    let cpu = Cpu::new().with_isa(isa).unwrap();
    let mut cache = cpu.create(CacheConfig::new(shape, mask).unwrap()).unwrap();
    let sequence = cache.add_sequence();
    let mut out = vec![0.0; scene.out.len()];
    for entry in [StepEntry::store(sequence, TOKENS), StepEntry::decode(sequence, 1)] {
        let rows = ViewShape::contiguous(entry.tokens, kv_heads, head_dim);
        let k = HostView::new(&scene.k[..], rows).unwrap();
        cache.plan(&[entry]).unwrap();
        cache.append(Layer(0), k, k).unwrap();
        if entry.attend {
            let row = ViewShape::contiguous(1, query_heads, head_dim);
            let q = HostView::new(&scene.q[..], row).unwrap();
            cache.attend(Layer(0), q, HostViewMut::new(&mut out[..], row).unwrap()).unwrap();
        }
        cache.commit().unwrap();
    }
    out
}

#[test]
fn results_are_those_of_rust() {
    for isa in Isa::ALL.into_iter().filter(|isa| isa.is_available()) {
        let mut scene = Scene::new(isa, None, ptr::null_mut());
        assert_eq!(scene.attend(), Status::Ok, "{}", last_error());
        assert_eq!(scene.out, in_rust(isa, &scene), "{isa}");
        assert!(scene.out.iter().any(|&x| x != 0.0));
    }
}

/// Two threads that share the pieces.
///
/// # Safety
/// As `leank_run`'s `piece` and `context`.
unsafe extern "C" fn shared(_: *mut c_void, count: usize, piece: Piece, context: *mut c_void) {
    let context = context.expose_provenance();
    let run = move |i| {
        // SAFETY: `shared` returns after the last piece.
        unsafe { piece(ptr::with_exposed_provenance_mut(context), i) }
    };
    std::thread::scope(|scope| {
        scope.spawn(move || (0..count / 2).for_each(run));
        (count / 2..count).for_each(run);
    });
}

/// Calls pieces as `user` says: a list of numbers that are added to the count.
///
/// # Safety
/// As [`shared`], and `user` is such a list.
unsafe extern "C" fn wrong(user: *mut c_void, count: usize, piece: Piece, context: *mut c_void) {
    // SAFETY: the test hands in a list.
    let extra = unsafe { &*user.cast::<Vec<isize>>() };
    for i in (0..count - 1).chain(extra.iter().map(|extra| count.wrapping_add_signed(*extra))) {
        // SAFETY: the run has not returned.
        unsafe { piece(context, i) };
    }
}

#[test]
fn threads_of_others_are_used_and_watched() {
    let mut alone = Scene::new(Isa::best(), None, ptr::null_mut());
    let mut scene = Scene::new(Isa::best(), Some(shared), ptr::null_mut());
    assert_eq!((alone.attend(), scene.attend()), (Status::Ok, Status::Ok));
    assert_eq!(alone.out, scene.out);

    for (extra, complaint) in [
        (vec![-1], None),
        (vec![], Some("was left out")),
        (vec![-1, -1], Some("no piece was left out")),
        (vec![-1, 0], Some("no piece was left out")),
        (vec![isize::MAX], Some("was left out")),
    ] {
        let user = (&raw const extra).cast_mut().cast();
        let mut scene = Scene::new(Isa::best(), Some(wrong), user);
        let status = scene.attend();
        let Some(complaint) = complaint else {
            assert_eq!(status, Status::Ok, "{}", last_error());
            continue;
        };
        assert_eq!(status, Status::Internal, "{extra:?}");
        assert!(last_error().contains(complaint), "{extra:?}: {}", last_error());
        // Nothing can be had of this cache any more, but it can be freed.
        assert_eq!(abi!(leank_cache_commit(scene.cache)), Status::Internal);
        assert!(last_error().contains("earlier call"), "{}", last_error());
    }
}

/// A runtime in error: it returns while a piece runs. `user` is where the piece stands.
///
/// # Safety
/// As [`shared`], and `user` is an `AtomicUsize` that lives until the piece has returned.
unsafe extern "C" fn returns_early(
    user: *mut c_void,
    _: usize,
    piece: Piece,
    context: *mut c_void,
) {
    // SAFETY: the caller's promise.
    let stands = unsafe { &*user.cast::<AtomicUsize>() };
    let context = context.expose_provenance();
    std::thread::spawn(move || {
        // SAFETY: the run waits for a piece that has begun.
        unsafe { piece(ptr::with_exposed_provenance_mut(context), 0) }
    });
    while stands.load(Ordering::SeqCst) == 0 {
        std::thread::yield_now();
    }
    stands.store(2, Ordering::SeqCst);
}

#[test]
fn a_piece_that_goes_on_after_its_run_is_waited_for() {
    let stands = AtomicUsize::new(0);
    let user = (&raw const stands).cast_mut().cast();
    let injected = Injected { run: returns_early, user, threads: 2 };
    let run = || {
        injected.run(1, &|_| {
            stands.store(1, Ordering::SeqCst);
            while stands.load(Ordering::SeqCst) == 1 {
                std::thread::yield_now();
            }
            std::thread::sleep(Duration::from_millis(20));
            stands.store(3, Ordering::SeqCst);
        });
    };
    let said = catch_unwind(AssertUnwindSafe(run)).unwrap_err();
    assert_eq!(stands.into_inner(), 3);
    let said = said.downcast::<String>().unwrap();
    assert!(said.contains("went on after its return"), "{said}");
}

/// Comes back to the cache that it writes from.
///
/// # Safety
/// `user` points to the cache's handle.
unsafe extern "C" fn comes_back(user: *mut c_void, _: *const c_void, len: usize) -> isize {
    // SAFETY: the test hands in a cache.
    let cache = unsafe { *user.cast::<*mut Handle>() };
    let mut sequence = 0;
    let status = abi!(leank_cache_add_sequence(cache, &mut sequence));
    abi!(leank_cache_free(cache)); // Refused, or what follows uses freed memory.
    if status == Status::Busy { len as isize } else { -1 }
}

#[test]
fn a_cache_in_use_says_so() {
    let mut scene = Scene::new(Isa::best(), None, ptr::null_mut());
    assert_eq!(abi!(leank_cache_cancel(scene.cache)), Status::Ok);
    let user = (&raw mut scene.cache).cast();
    let status = abi!(leank_cache_save(scene.cache, scene.sequence, Some(comes_back), user));
    assert_eq!(status, Status::Ok, "{}", last_error());
    let mut tokens = 0;
    assert_eq!(
        abi!(leank_cache_sequence_len(scene.cache, scene.sequence, &mut tokens)),
        Status::Ok
    );
    assert_eq!(tokens, TOKENS);
}

#[cfg(feature = "capi-files")]
#[test]
fn masks_come_from_files() {
    use leank_core::{MaskInfo as Info, Windows, files::write_mask};

    let (_, kv_heads, head_dim) = SHAPE;
    let heads = kept().map(|kept| ChannelMask::new(head_dim, kept).unwrap()).to_vec();
    let info = Info {
        model_id: Some("mine".into()),
        windows: Some(Windows { sink: 3, recent: 70 }),
        ..Info::default()
    };
    let mask = ModelMask::new(1, kv_heads, head_dim, heads).unwrap().with_info(info).unwrap();
    let dir = TempDir::new("mask");
    let path = dir.0.join("mask.safetensors");
    let name = CString::new(path.to_str().unwrap()).unwrap();
    let mut read = ptr::null_mut();
    assert_eq!(abi!(leank_mask_read(name.as_ptr(), &mut read)), Status::Io);
    assert!(read.is_null() && last_error().contains("mask.safetensors"), "{}", last_error());
    write_mask(&path, &mask).unwrap();
    assert_eq!(abi!(leank_mask_read(name.as_ptr(), &mut read)), Status::Ok, "{}", last_error());

    let mut info = std::mem::MaybeUninit::uninit();
    let size = size_of::<MaskInfo>();
    assert_eq!(abi!(leank_mask_get_info(read, info.as_mut_ptr(), size)), Status::Ok);
    let info = abi!(info.assume_init());
    assert_eq!((info.sink, info.recent, info.kept_k), (3, 70, 30.0 / 128.0));
    assert_eq!(abi!(CStr::from_ptr(info.model_id)), c"mine");
    // Its windows are those of a cache that asks for no others.
    let config = Config {
        layers: 1,
        query_heads: kv_heads,
        kv_heads,
        head_dim,
        mask: read,
        recent: 80,
        ..Options::defaults()
    };
    let config = abi!(crate::capi::config::read(&config)).unwrap();
    assert_eq!((config.windows, &config.mask), (Windows { sink: 3, recent: 80 }, &mask));
    std::fs::write(&path, "no mask").unwrap();
    abi!(leank_mask_free(read));
    assert_eq!(abi!(leank_mask_read(name.as_ptr(), &mut read)), Status::Format);
    assert!(read.is_null());
}

/// A folder that goes away.
struct TempDir(PathBuf);

impl TempDir {
    fn new(name: &str) -> Self {
        let dir = std::env::temp_dir().join(format!("leank-capi-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        Self(dir)
    }
}

impl Drop for TempDir {
    fn drop(&mut self) {
        std::fs::remove_dir_all(&self.0).unwrap();
    }
}
