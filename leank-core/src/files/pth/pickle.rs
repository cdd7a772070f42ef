//! An unpickler for one tensor, and nothing else.
//!
//! A pickle is a program for a stack machine whose `REDUCE` calls any Python function: loading one
//! from a stranger runs the stranger's code. This machine knows only the opcodes that `torch.save`
//! needs for a tensor (pickle protocols 2 to 5), only the functions in [`GLOBALS`], and "calls"
//! them by building a description of the tensor. Anything else is an error.
//!
//! Values live in an arena and refer to each other by index, so that neither sharing through the
//! memo nor deep nesting costs more than the pickle's own length, and nothing recurses.

/// Longest pickle that is looked at. One of a mask has 160 bytes, with names some hundred more.
pub(super) const MAX_PICKLE_BYTES: usize = 16 << 10;
/// Most axes of a tensor; a mask has three.
const MAX_AXES: usize = 8;
/// Longest name of a storage: a decimal number.
const MAX_KEY_BYTES: usize = 20;
/// Largest index in the memo, on which the memo's size depends.
const MAX_MEMO: usize = 4096;

/// Element types of a storage.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Element {
    F64,
    F32,
    F16,
    Bf16,
    I64,
    I32,
    I16,
    I8,
    U8,
    Bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Global {
    RebuildTensor,
    RebuildParameter,
    OrderedDict,
    Storage(Element),
}

/// Everything that a pickle may name.
const GLOBALS: [(&str, &str, Global); 13] = [
    ("torch._utils", "_rebuild_tensor_v2", Global::RebuildTensor),
    ("torch._utils", "_rebuild_parameter", Global::RebuildParameter),
    ("collections", "OrderedDict", Global::OrderedDict),
    ("torch", "DoubleStorage", Global::Storage(Element::F64)),
    ("torch", "FloatStorage", Global::Storage(Element::F32)),
    ("torch", "HalfStorage", Global::Storage(Element::F16)),
    ("torch", "BFloat16Storage", Global::Storage(Element::Bf16)),
    ("torch", "LongStorage", Global::Storage(Element::I64)),
    ("torch", "IntStorage", Global::Storage(Element::I32)),
    ("torch", "ShortStorage", Global::Storage(Element::I16)),
    ("torch", "CharStorage", Global::Storage(Element::I8)),
    ("torch", "ByteStorage", Global::Storage(Element::U8)),
    ("torch", "BoolStorage", Global::Storage(Element::Bool)),
];

/// A tensor as the pickle describes it. Nothing of it is checked against the data yet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct TensorSpec {
    /// Element type of the storage.
    pub(super) element: Element,
    /// Name of the storage's entry under `data/`.
    pub(super) key: String,
    /// Elements of the storage.
    pub(super) elements: u64,
    /// First element of the tensor within the storage.
    pub(super) offset: u64,
    /// Sizes of the axes.
    pub(super) shape: Vec<u64>,
    /// Elements between neighbours, per axis.
    pub(super) strides: Vec<u64>,
}

type Id = usize;
type Parsed<T> = Result<T, String>;

#[derive(Clone, Debug)]
enum Value {
    None,
    Bool,
    Int(i64),
    Text(String),
    Tuple(Vec<Id>),
    Global(Global),
    Storage {
        element: Element,
        key: String,
        elements: u64,
    },
    Tensor(TensorSpec),
    /// The values of a dictionary; its keys do not matter here.
    Dict(Vec<Id>),
}

/// Runs the pickle. It must leave one tensor, or a dictionary with exactly one value, a tensor.
pub(super) fn tensor(pickle: &[u8]) -> Parsed<TensorSpec> {
    let mut machine = Machine { input: pickle, ..Machine::default() };
    let result = machine.run()?;
    match &machine.arena[result] {
        Value::Tensor(tensor) => Ok(tensor.clone()),
        Value::Dict(values) => match values[..] {
            [value] => match &machine.arena[value] {
                Value::Tensor(tensor) => Ok(tensor.clone()),
                _ => Err("it holds a dictionary without a tensor".into()),
            },
            _ => Err(format!(
                "it holds a dictionary of {} things; save the mask's tensor alone: \
                 torch.save(mask, path)",
                values.len()
            )),
        },
        _ => Err("it holds no tensor; save the mask's tensor: torch.save(mask, path)".into()),
    }
}

#[derive(Default)]
struct Machine<'a> {
    input: &'a [u8],
    arena: Vec<Value>,
    stack: Vec<Id>,
    /// Heights of the stack at each open mark.
    marks: Vec<usize>,
    memo: Vec<Option<Id>>,
}

impl<'a> Machine<'a> {
    /// Runs up to `STOP` and returns what it leaves. Each opcode takes at least a byte and makes at
    /// most one value, so the pickle's length bounds the work.
    fn run(&mut self) -> Parsed<Id> {
        loop {
            match self.byte()? {
                b'.' => {
                    let result = self.pop()?;
                    return match (&self.stack[..], &self.marks[..]) {
                        ([], []) => Ok(result),
                        _ => Err("its pickle leaves things on the stack".into()),
                    };
                }
                0x80 => match self.byte()? {
                    2..=5 => {}
                    version => return Err(format!("pickle protocol {version}; 2 to 5 are read")),
                },
                // FRAME: a hint of how much to read ahead.
                0x95 => drop(self.take(8)?),
                opcode => self.step(opcode)?,
            }
        }
    }

    fn step(&mut self, opcode: u8) -> Parsed<()> {
        match opcode {
            b'N' => self.push(Value::None),
            0x88 | 0x89 => self.push(Value::Bool),
            b'J' => {
                let value = i32::from_le_bytes(self.array()?);
                self.push(Value::Int(value.into()));
            }
            b'K' => {
                let value = self.byte()?;
                self.push(Value::Int(value.into()));
            }
            b'M' => {
                let value = u16::from_le_bytes(self.array()?);
                self.push(Value::Int(value.into()));
            }
            0x8a => self.long()?,
            b'X' => {
                let length = u32::from_le_bytes(self.array()?);
                self.text(length as usize)?;
            }
            0x8c => {
                let length = self.byte()?;
                self.text(length.into())?;
            }
            b'(' => self.marks.push(self.stack.len()),
            b')' => self.push(Value::Tuple(Vec::new())),
            b't' => {
                let items = self.pop_to_mark()?;
                self.push(Value::Tuple(items));
            }
            0x85..=0x87 => {
                let items = self.pop_many(usize::from(opcode - 0x84))?;
                self.push(Value::Tuple(items));
            }
            b'}' => self.push(Value::Dict(Vec::new())),
            b's' => {
                let items = self.pop_many(2)?;
                self.set_items(&items)?;
            }
            b'u' => {
                let items = self.pop_to_mark()?;
                self.set_items(&items)?;
            }
            b'b' => self.build()?,
            b'q' | b'r' | b'h' | b'j' | 0x94 => self.memo(opcode)?,
            b'c' => {
                let (module, name) = (self.line()?, self.line()?);
                self.global(module, name)?;
            }
            0x93 => {
                let (name, module) = (self.pop_text()?, self.pop_text()?);
                self.global(&module, &name)?;
            }
            b'Q' => self.persistent_id()?,
            b'R' => self.reduce()?,
            _ => {
                return Err(format!(
                    "its pickle uses opcode {opcode:#04x}, which no saved tensor needs; it is not \
                     run"
                ));
            }
        }
        Ok(())
    }

    // --- Input ---

    fn take(&mut self, length: usize) -> Parsed<&'a [u8]> {
        let (taken, rest) =
            self.input.split_at_checked(length).ok_or("its pickle ends too early")?;
        self.input = rest;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Parsed<[u8; N]> {
        let (taken, rest) =
            self.input.split_first_chunk::<N>().ok_or("its pickle ends too early")?;
        self.input = rest;
        Ok(*taken)
    }

    fn byte(&mut self) -> Parsed<u8> {
        self.array::<1>().map(|[byte]| byte)
    }

    fn line(&mut self) -> Parsed<&'a str> {
        let end = self.input.iter().position(|&byte| byte == b'\n');
        let line = self.take(end.ok_or("its pickle ends within a name")?)?;
        self.take(1)?;
        std::str::from_utf8(line).map_err(|_| "a name in its pickle is not text".into())
    }

    /// `LONG1`: a little-endian two's complement integer of any length; up to 8 bytes here.
    fn long(&mut self) -> Parsed<()> {
        let length = self.byte()?;
        let bytes = self.take(length.into())?;
        let sign = if bytes.last().is_some_and(|byte| byte & 0x80 != 0) { 0xff } else { 0 };
        let mut wide = [sign; 8];
        wide.get_mut(..bytes.len())
            .ok_or("an integer in its pickle is too large")?
            .copy_from_slice(bytes);
        self.push(Value::Int(i64::from_le_bytes(wide)));
        Ok(())
    }

    fn text(&mut self, length: usize) -> Parsed<()> {
        let bytes = self.take(length)?;
        let text = std::str::from_utf8(bytes).map_err(|_| "a string in its pickle is not UTF-8")?;
        self.push(Value::Text(text.into()));
        Ok(())
    }

    // --- Stack and memo ---

    fn push(&mut self, value: Value) {
        self.stack.push(self.arena.len());
        self.arena.push(value);
    }

    fn pop(&mut self) -> Parsed<Id> {
        let floor = self.marks.last().copied().unwrap_or(0);
        if self.stack.len() <= floor {
            return Err("its pickle takes from an empty stack".into());
        }
        self.stack.pop().ok_or_else(|| "its pickle takes from an empty stack".into())
    }

    fn pop_many(&mut self, count: usize) -> Parsed<Vec<Id>> {
        let mut items = (0..count).map(|_| self.pop()).collect::<Parsed<Vec<_>>>()?;
        items.reverse();
        Ok(items)
    }

    fn pop_to_mark(&mut self) -> Parsed<Vec<Id>> {
        let mark = self.marks.pop().ok_or("its pickle closes a mark that it did not open")?;
        Ok(self.stack.split_off(mark))
    }

    fn pop_text(&mut self) -> Parsed<String> {
        let id = self.pop()?;
        match &self.arena[id] {
            Value::Text(text) => Ok(text.clone()),
            _ => Err("its pickle names a global by something that is not a string".into()),
        }
    }

    fn memo(&mut self, opcode: u8) -> Parsed<()> {
        let index = match opcode {
            b'q' | b'h' => self.byte()?.into(),
            b'r' | b'j' => u32::from_le_bytes(self.array()?) as usize,
            // MEMOIZE takes the next free index.
            _ => self.memo.len(),
        };
        if opcode == b'h' || opcode == b'j' {
            let id = self.memo.get(index).copied().flatten();
            self.stack.push(id.ok_or("its pickle recalls what it did not memorise")?);
            return Ok(());
        }
        if index > MAX_MEMO {
            return Err(format!("its pickle memorises under index {index}"));
        }
        let floor = self.marks.last().copied().unwrap_or(0);
        let top = self.stack[floor..].last().copied();
        let top = top.ok_or("its pickle memorises from an empty stack")?;
        if index >= self.memo.len() {
            self.memo.resize(index + 1, None);
        }
        self.memo[index] = Some(top);
        Ok(())
    }

    fn set_items(&mut self, items: &[Id]) -> Parsed<()> {
        if !items.len().is_multiple_of(2) {
            return Err("its pickle sets a key without a value".into());
        }
        let dict = self.stack.last().copied().ok_or("its pickle sets items of nothing")?;
        match &mut self.arena[dict] {
            Value::Dict(values) => values.extend(items.iter().skip(1).step_by(2)),
            _ => return Err("its pickle sets items of what is no dictionary".into()),
        }
        Ok(())
    }

    /// `BUILD` sets attributes; a saved state dictionary has some (`_metadata`), which say nothing
    /// about the tensor.
    fn build(&mut self) -> Parsed<()> {
        self.pop()?;
        match self.stack.last().map(|&id| &self.arena[id]) {
            Some(Value::Dict(_)) => Ok(()),
            _ => Err("its pickle sets attributes of what is no dictionary".into()),
        }
    }

    // --- What torch.save does ---

    fn global(&mut self, module: &str, name: &str) -> Parsed<()> {
        let known = GLOBALS.iter().find(|entry| (entry.0, entry.1) == (module, name));
        let (_, _, global) = known.ok_or_else(|| {
            let (module, name) = (shorten(module), shorten(name));
            format!(
                "its pickle names `{module}.{name}`, which is not needed for a tensor. It is not \
                 run; do not load this file with other programs unless you trust its author"
            )
        })?;
        self.push(Value::Global(*global));
        Ok(())
    }

    /// `('storage', class, key, location, elements)` stands for a storage.
    fn persistent_id(&mut self) -> Parsed<()> {
        let wrong = || "its pickle refers to a storage in an unknown way".to_owned();
        let id = self.pop()?;
        let Value::Tuple(items) = &self.arena[id] else { return Err(wrong()) };
        let &[tag, class, key, _location, elements] = &items[..] else { return Err(wrong()) };
        let [tag, class, key, elements] = [tag, class, key, elements].map(|id| &self.arena[id]);
        let storage = match (tag, class, key, elements) {
            (
                Value::Text(tag),
                Value::Global(Global::Storage(element)),
                Value::Text(key),
                Value::Int(elements),
            ) if tag == "storage" && key.len() <= MAX_KEY_BYTES => Value::Storage {
                element: *element,
                key: key.clone(),
                elements: u64::try_from(*elements).map_err(|_| wrong())?,
            },
            _ => return Err(wrong()),
        };
        self.push(storage);
        Ok(())
    }

    fn reduce(&mut self) -> Parsed<()> {
        let wrong = || "its pickle calls a function with arguments that torch.save does not give";
        let (arguments, callee) = (self.pop()?, self.pop()?);
        let Value::Tuple(arguments) = &self.arena[arguments] else { return Err(wrong().into()) };
        let result = match (&self.arena[callee], &arguments[..]) {
            (Value::Global(Global::OrderedDict), []) => Value::Dict(Vec::new()),
            // The tensor, whether it wants a gradient, and its hooks.
            (Value::Global(Global::RebuildParameter), &[tensor, _, _]) => {
                match &self.arena[tensor] {
                    Value::Tensor(tensor) => Value::Tensor(tensor.clone()),
                    _ => return Err(wrong().into()),
                }
            }
            // After the strides: whether it wants a gradient, its hooks and maybe metadata.
            (
                Value::Global(Global::RebuildTensor),
                &[storage, offset, shape, strides, _, _]
                | &[storage, offset, shape, strides, _, _, _],
            ) => self.rebuild_tensor([storage, offset, shape, strides])?,
            _ => return Err(wrong().into()),
        };
        self.push(result);
        Ok(())
    }

    fn rebuild_tensor(&self, arguments: [Id; 4]) -> Parsed<Value> {
        let [storage, offset, shape, strides] = arguments;
        let Value::Storage { element, key, elements } = &self.arena[storage] else {
            return Err("its pickle makes a tensor of what is no storage".into());
        };
        let (shape, strides) = (self.sizes(shape)?, self.sizes(strides)?);
        if shape.len() != strides.len() {
            return Err("its tensor has other numbers of sizes than of strides".into());
        }
        Ok(Value::Tensor(TensorSpec {
            element: *element,
            key: key.clone(),
            elements: *elements,
            offset: self.size(offset)?,
            shape,
            strides,
        }))
    }

    fn sizes(&self, tuple: Id) -> Parsed<Vec<u64>> {
        match &self.arena[tuple] {
            Value::Tuple(items) if items.len() <= MAX_AXES => {
                items.iter().map(|&item| self.size(item)).collect()
            }
            _ => Err("its tensor has no proper sizes and strides".into()),
        }
    }

    fn size(&self, id: Id) -> Parsed<u64> {
        match &self.arena[id] {
            Value::Int(value) => u64::try_from(*value).ok(),
            _ => None,
        }
        .ok_or_else(|| "a size, stride or offset of its tensor is not a number from 0".into())
    }
}

/// A name from the file, fit for a message.
fn shorten(name: &str) -> String {
    name.chars().take(80).flat_map(char::escape_default).collect()
}
