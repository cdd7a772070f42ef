//! Any calls in any order on a CPU cache of any small configuration.

use arbitrary::{Arbitrary, Unstructured};
use leank_core::{
    CacheConfig, ChannelMask, Dtype, HeadFormat, LeanFormat, ModelMask, ModelShape, Windows,
};

use crate::cache_world::{Spoil, World};

/// Most operations of one input.
const MAX_OPERATIONS: usize = 60;

/// One call, or a whole step.
#[derive(Arbitrary, Debug)]
enum Operation {
    Add,
    /// A whole step as an engine makes it.
    Step(Vec<Load>),
    /// A plan of anything.
    Plan(Vec<Load>),
    Append {
        layer: u8,
        spoil: Option<u16>,
    },
    Attend {
        layer: u8,
    },
    Commit,
    Cancel,
    Release {
        sequence: u8,
    },
    Fork {
        sequence: u8,
    },
    /// Takes tokens back; 255: asks for more than there are.
    Truncate {
        sequence: u8,
        back: u8,
    },
    /// Saves a sequence and restores it beside itself.
    Copy {
        sequence: u8,
    },
}

#[derive(Arbitrary, Clone, Copy, Debug)]
struct Load {
    sequence: u8,
    tokens: u8,
    attend: bool,
}

impl Load {
    fn decode(self, sequences: usize) -> (usize, usize, bool) {
        // One more than there are: a sequence that never was.
        let sequence = usize::from(self.sequence) % (sequences + 1);
        let tokens = match self.tokens {
            254 => usize::MAX / 2,
            255 => usize::MAX,
            // Mostly a few, as in decoding; sometimes a prompt.
            tokens @ 200.. => usize::from(tokens - 200),
            tokens => usize::from(tokens % 6),
        };
        (sequence, tokens, self.attend)
    }
}

/// Bytes become a configuration and a list of operations.
pub fn cache_ops(data: &[u8]) {
    let mut bytes = Unstructured::new(data);
    // Both fail only on inputs that are too short.
    let Ok(config) = config(&mut bytes) else { return };
    let mut world = World::new(config);
    world.add();
    for _ in 0..MAX_OPERATIONS {
        if bytes.is_empty() {
            break;
        }
        let Ok(operation) = Operation::arbitrary(&mut bytes) else { break };
        run(&mut world, operation);
        world.check();
    }
    // A step that was left open must be possible to take back, and everything to be freed.
    world.cancel();
    for sequence in 0..world.sequences() {
        world.release(sequence);
    }
    world.check();
}

fn run(world: &mut World, operation: Operation) {
    // One more layer than there is.
    let layer = |layer: u8| usize::from(layer) % (world.layers() + 1);
    let decode = |loads: Vec<Load>, sequences| {
        loads.into_iter().take(4).map(|load| load.decode(sequences)).collect()
    };
    match operation {
        Operation::Add => world.add(),
        Operation::Step(loads) => {
            let loads = decode(loads, world.sequences());
            world.plan(loads);
            for layer in 0..world.layers() {
                world.append(layer, Spoil::Nothing);
                world.attend(layer);
            }
            world.commit();
        }
        Operation::Plan(loads) => world.plan(decode(loads, world.sequences())),
        Operation::Append { layer: index, spoil } => {
            let spoil = match spoil {
                None => Spoil::Nothing,
                Some(0) => Spoil::Shape,
                Some(at) => Spoil::NotFinite(at),
            };
            world.append(layer(index), spoil);
        }
        Operation::Attend { layer: index } => world.attend(layer(index)),
        Operation::Commit => world.commit(),
        Operation::Cancel => world.cancel(),
        Operation::Release { sequence } => {
            world.release(usize::from(sequence) % world.sequences());
        }
        Operation::Fork { sequence } => world.fork(usize::from(sequence) % world.sequences()),
        Operation::Truncate { sequence, back } => {
            world.truncate(usize::from(sequence) % world.sequences(), back);
        }
        Operation::Copy { sequence } => world.copy(usize::from(sequence) % world.sequences()),
    }
}

fn config(bytes: &mut Unstructured<'_>) -> arbitrary::Result<CacheConfig> {
    let layers = bytes.int_in_range(1..=2)?;
    let kv_heads = bytes.int_in_range(1..=3)?;
    let group = bytes.int_in_range(1..=3)?;
    let head_dim = *bytes.choose(&[1, 2, 7, 8, 16, 20, 40])?;
    let heads = layers * kv_heads;
    let masks = (0..heads).map(|_| channel_mask(bytes, head_dim)).collect::<Result<_, _>>()?;
    let dtype = dtype(bytes)?;
    let formats = if bytes.arbitrary()? {
        let formats =
            (0..heads).map(|_| Ok(HeadFormat { k: lean_format(bytes)?, v: lean_format(bytes)? }));
        Some(formats.collect::<arbitrary::Result<_>>()?)
    } else {
        None
    };
    let windows = Windows {
        sink: bytes.int_in_range(0..=12)?,
        recent: match bytes.int_in_range(0..=24)? {
            24 => usize::MAX,
            recent => recent,
        },
    };
    let shape =
        ModelShape::new(layers, group * kv_heads, kv_heads, head_dim).expect("a small shape");
    let mask = ModelMask::new(layers, kv_heads, head_dim, masks).expect("of the shape");
    Ok(CacheConfig {
        windows,
        block: bytes.int_in_range(1..=9)?,
        dtype,
        formats,
        soft_cap: bytes.arbitrary::<bool>()?.then_some(4.0),
        limit: bytes.arbitrary::<bool>()?.then_some(bytes.int_in_range(0..=65_535)?),
        ..CacheConfig::new(shape, mask).expect("the mask is of the shape")
    })
}

fn dtype(bytes: &mut Unstructured<'_>) -> arbitrary::Result<Dtype> {
    bytes.choose(&Dtype::ALL).copied()
}

/// Plain elements or codes, every one that the CPU backend has.
fn lean_format(bytes: &mut Unstructured<'_>) -> arbitrary::Result<LeanFormat> {
    let codes = [LeanFormat::Int8, LeanFormat::Int4];
    let all: Vec<_> = Dtype::ALL.map(LeanFormat::Plain).into_iter().chain(codes).collect();
    bytes.choose(&all).copied()
}

/// Dead, whole, or any set.
fn channel_mask(bytes: &mut Unstructured<'_>, head_dim: usize) -> arbitrary::Result<ChannelMask> {
    let flags = match bytes.int_in_range(0..=3)? {
        0 => 0,
        1 => u64::MAX,
        _ => bytes.arbitrary::<u64>()?,
    };
    let flags: Vec<bool> = (0..head_dim).map(|channel| flags >> channel & 1 == 1).collect();
    Ok(ChannelMask::from_flags(&flags).expect("a small head"))
}
