"""All mutants of a package in one build: which of them does no test notice? tools/mutants.sh calls it.

What is mutated, and how, `cargo mutants --list --json` says. It would compile the package and its tests anew for each;
here they are compiled once, every mutant behind a switch that is chosen when a test starts. Each test is first run
alone to see which mutants it reaches; of each mutant only those tests run that reach it, the quickest first, until one
fails. What cannot be switched at run time is printed: constants, `const fn`, let chains, fields of structs, returned
`impl Trait`.

Usage: mutants.py TREE PACKAGE MUTANTS.json STATE [--tests REGEX] [--only REGEX] [--jobs N] [--programs COMMAND]
[--step build|run], with TREE a copy of the repository, which is changed, and STATE a folder for what was found out. A
second run takes up what an earlier one left, and tries again what survived. COMMAND, run by bash in TREE, writes more
tests into the folder $PROGRAMS: programs without arguments. With `--step build` it ends when the tests are compiled,
their binaries in STATE; with `--step run` it takes those, so that another machine, with more cores or more instructions,
can run them (TREE at the same path there, or `--tests` without those that read files of the repository).
"""
import argparse, collections, json, os, pathlib, re, resource, shutil, subprocess, sys, threading
from concurrent.futures import ThreadPoolExecutor, as_completed

ON = 'crate::mutant_switch::on'
ALLOW = '#![allow(warnings, arithmetic_overflow, unconditional_panic)]'
SWITCH = '''
mod mutant_switch {
    use std::{io::Write, sync::atomic::{AtomicBool, AtomicU32, Ordering::Relaxed}};
    const UNKNOWN: u32 = u32::MAX;
    const RECORD: u32 = u32::MAX - 1;
    const NONE: u32 = u32::MAX - 2;
    static ACTIVE: AtomicU32 = AtomicU32::new(UNKNOWN);
    static REACHED: [AtomicBool; 1 << 13] = [const { AtomicBool::new(false) }; 1 << 13];
    #[inline(always)]
    pub(crate) fn on(n: u32) -> bool {
        let active = ACTIVE.load(Relaxed);
        if active < RECORD { active == n } else { slow(n) }
    }
    #[cold]
    #[inline(never)]
    fn slow(n: u32) -> bool {
        if ACTIVE.load(Relaxed) == RECORD && REACHED[n as usize].load(Relaxed) {
            return false; // in inner loops, again and again
        }
        let record = std::env::var("MUTANTS_REACHED");
        if ACTIVE.load(Relaxed) == UNKNOWN {
            let active = std::env::var("MUTANT").map_or(NONE, |n| n.parse().unwrap());
            ACTIVE.store(if record.is_ok() { RECORD } else { active }, Relaxed);
        }
        if ACTIVE.load(Relaxed) == RECORD && !REACHED[n as usize].swap(true, Relaxed) {
            let mut file = std::fs::File::options().append(true).create(true).open(record.unwrap()).unwrap();
            file.write_all(&n.to_le_bytes()).unwrap();
        }
        ACTIVE.load(Relaxed) == n
    }
}
'''
CONSTANT = ('const_item', 'static_item', 'array_type', 'const_block', 'enum_variant')
MUTATED = {
    'FnValue': ('function_item',),
    'BinaryOperator': ('binary_expression', 'compound_assignment_expr'),
    'UnaryOperator': ('unary_expression',),
    'MatchArm': ('match_arm',),
    'MatchArmGuard': ('match_arm',),
}


def marked(mutants, text):
    """Marks what errors of the compiler in `text` are the fault of."""
    ns = ','.join(str(m['n']) for m in mutants)
    return f'/*<{ns}*/{text}/*>{ns}*/'


class File:
    """A source file and the mutants in it."""

    def __init__(self, text, mutants):
        # Here, since a machine that only runs the tests may have neither.
        import tree_sitter, tree_sitter_rust
        self.source = text.encode()
        self.tree = tree_sitter.Parser(tree_sitter.Language(tree_sitter_rust.language())).parse(self.source)
        self.lines = text.split('\n')
        self.starts = [0]
        for line in self.lines:
            self.starts.append(self.starts[-1] + len(line.encode()) + 1)
        self.of_node, self.left = collections.defaultdict(list), {}
        for m in mutants:
            node, why = self.find(m)
            if node is None:
                self.left[m['n']] = why
            else:
                self.of_node[node.id].append(m)

    def offset(self, place):
        line = place['line'] - 1
        return self.starts[line] + len(self.lines[line][:place['column'] - 1].encode())

    def find(self, m):
        """The node to change, or why there is none."""
        start, end = self.offset(m['span']['start']), self.offset(m['span']['end'])
        node = self.tree.root_node.descendant_for_byte_range(start, max(end - 1, start))
        if m['genre'] == 'BinaryOperator' and node.parent.type == 'let_chain':
            return None, 'let chain'
        while node is not None and node.type not in MUTATED.get(m['genre'], ()):
            node = node.parent
        if node is None:
            return None, m['genre']
        if node.type == 'match_arm':
            guard = node.child_by_field_name('pattern').child_by_field_name('condition')
            if guard is not None and guard.type in ('let_chain', 'let_condition'):
                return None, 'let chain'
        if node.type == 'function_item':
            returned = node.child_by_field_name('return_type')
            if returned is not None and returned.text.startswith(b'impl'):
                return None, 'impl Trait'
        outer = node
        while outer is not None:
            words = [c.text.split() for c in outer.children if c.type == 'function_modifiers']
            if outer.type in CONSTANT or any(b'const' in word for word in words):
                return None, 'constant'
            outer = None if outer.type == 'function_item' else outer.parent
        return node, None

    def switched(self):
        return self.render(self.tree.root_node, self.source)

    def render(self, node, _=None):
        own = self.of_node.get(node.id)
        if not own:
            return self.copy(node)
        text = getattr(self, node.type)(node, own)
        return text if node.type == 'function_item' else marked(own, text)

    def copy(self, node, replaced={}):
        """The node's text, with what lies below it rendered or replaced."""
        start = 0 if node.parent is None else node.start_byte
        end = len(self.source) if node.parent is None else node.end_byte
        out = []
        for child in node.children:
            out += [self.source[start:child.start_byte].decode(), replaced.get(child.id) or self.render(child)]
            start = child.end_byte
        return ''.join(out) + self.source[start:end].decode()

    def function_item(self, node, own):
        body = node.child_by_field_name('body')
        first = ''.join(marked([m], f'if {ON}({m["n"]}) {{ return {m["replacement"]}; }} ') for m in own)
        return self.copy(node, {body.id: '{ ' + first + self.copy(body)[1:]})

    def unary_expression(self, node, own):
        return f'(if {ON}({own[0]["n"]}) {{ {self.render(node.children[1])} }} else {{ {self.copy(node)} }})'

    def match_arm(self, node, own):
        pattern = node.child_by_field_name('pattern')
        guard = pattern.child_by_field_name('condition')
        text = 'true' if guard is None else self.render(guard)
        for m in own:
            on = f'{ON}({m["n"]})'
            text = f'({on} || {text})' if m['replacement'] == 'true' else f'(!{on} && {text})'
        if guard is None:
            return self.copy(node, {pattern.id: f'{self.copy(pattern)} if {text}'})
        return self.copy(node, {pattern.id: self.copy(pattern, {guard.id: text})})

    def operands(self, node):
        sides = (self.render(node.child_by_field_name(side)) for side in ('left', 'right'))
        return *sides, node.child_by_field_name('operator').text.decode()

    def compound_assignment_expr(self, node, own):
        left, right, operator = self.operands(node)
        return '{ ' + self.choose(own, operator, lambda operator: f'{left} {operator} {right};') + ' }'

    def binary_expression(self, node, own):
        left, right, operator = self.operands(node)
        if operator in ('&&', '||'):
            # The left side that decides: `false` of `&&`, `true` of `||`, and the other way when switched.
            decides = ('!' if operator == '||' else '') + f'{ON}({own[0]["n"]})'
            return f'({{ let __l: bool = {left}; if __l == {decides} {{ __l }} else {{ {right} }} }})'
        if operator in ('==', '!=', '<', '>', '<=', '>='):
            choice = self.choose(own, operator, lambda operator: f'*__l {operator} *__r')
            return f'(match (&({left}), &({right})) {{ (__l, __r) => {choice} }})'
        choice = self.choose(own, operator, lambda operator: f'__l {operator} __r')
        return f'(match ({left}, {right}) {{ (__l, __r) => {choice} }})'

    def choose(self, own, operator, expression):
        other = lambda m: marked([m], f'if {ON}({m["n"]}) {{ {expression(m["replacement"])} }} else ')
        return ''.join(map(other, own)) + f'{{ {expression(operator)} }}'


def culprits(text, start, end):
    """The mutants whose marks lie closest around a range of bytes; where none do, those within it."""
    stack, regions = [], []
    for mark in re.finditer(rb'/\*([<>])([\d,]+)\*/', text):
        if mark[1] == b'<':
            stack.append(mark.start())
        else:
            begin = stack.pop()
            regions.append((mark.end() - begin, begin, mark.end(), mark[2]))
    around = sorted(r for r in regions if r[1] <= start and end <= r[2])[:1]
    found = around or [r for r in regions if r[1] < end and start < r[2]]
    return {int(n) for region in found for n in region[3].split(b',')}


def build(tree, package, pristine, mutants, state):
    """Compiles the package and its tests with all mutants but those with which it does not compile. Returns the test
    binaries, why mutants are left to others, and which do not compile."""
    lib = f'{package}/src/lib.rs'
    record = state / 'broken.json'
    known = json.loads(record.read_text()) if record.exists() else {}
    broken = {m['n']: known[m['name']] for m in mutants if m['name'] in known}
    while True:
        left = {}
        for path, text in pristine.items():
            file = File(text, [m for m in mutants if m['file'] == path and m['n'] not in broken])
            left |= file.left
            lines = file.switched().split('\n')
            if path == lib:
                documentation = next(i for i, line in enumerate(lines) if not line.startswith('//!'))
                lines[documentation:documentation] = [ALLOW]
                lines.append(SWITCH)
            (tree / path).write_text('\n'.join(lines))
        command = ['cargo', 'test', '--no-run', '--tests', '--all-features', '--package', package]
        run = subprocess.run([*command, '--message-format=json'], cwd=tree, stdin=subprocess.DEVNULL, capture_output=True)
        messages = [json.loads(line) for line in run.stdout.splitlines() if line.startswith(b'{')]
        if run.returncode == 0:
            tests = [m['executable'] for m in messages
                     if m['reason'] == 'compiler-artifact' and m['executable'] and m['profile']['test']]
            return tests, left, broken
        errors = [m['message'] for m in messages if m['reason'] == 'compiler-message' and m['message']['level'] == 'error']
        before = len(broken)
        for error in errors:
            for span in sorted(error['spans'], key=lambda span: not span['is_primary']):
                path = tree / span['file_name']
                if path.exists() and (found := culprits(path.read_bytes(), span['byte_start'], span['byte_end'])):
                    broken |= {n: error['message'] for n in found if n not in broken}
                    break
        print(f'{len(errors)} errors: {len(broken) - before} mutants do not compile', flush=True)
        record.write_text(json.dumps(known | {mutants[n]['name']: why for n, why in broken.items()}))
        if len(broken) == before:
            sys.exit(run.stderr.decode()[-3000:] + ''.join(e['rendered'] for e in errors)[-3000:])


class Test:
    def __init__(self, name, command, folder):
        self.name, self.command, self.folder, self.seconds = name, command, folder, 60.0

    def run(self, **environment):
        """Whether it passes, and the processor's seconds it took."""
        limit = int(3 + 8 * self.seconds)

        def limits():
            # Whatever else the machine does: loops without end take processor time.
            resource.setrlimit(resource.RLIMIT_CPU, (limit, limit))
            resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

        quiet = dict.fromkeys(('stdin', 'stdout', 'stderr'), subprocess.DEVNULL)
        # Of the same cases each time: they reach the same mutants and take as long.
        environment |= {'PROPTEST_RNG_SEED': '1', 'PROPTEST_DISABLE_FAILURE_PERSISTENCE': '1',
                        'PROPTEST_MAX_SHRINK_ITERS': '0'}
        process = subprocess.Popen(self.command, cwd=self.folder, env=os.environ | environment, preexec_fn=limits, **quiet)
        # And those that sleep do not wake.
        watch = threading.Timer(120 + 2 * limit, process.kill)
        watch.start()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = status
        watch.cancel()
        return status, usage.ru_utime + usage.ru_stime


def tests_of(binaries, programs, folder, pattern):
    for binary in binaries:
        names = subprocess.run([binary, '--list', '--format', 'terse'], cwd=folder, capture_output=True, text=True).stdout
        names = [line.removesuffix(': test') for line in names.splitlines() if line.endswith(': test')]
        yield from (Test(name, [binary, '--exact', name], folder) for name in names if re.search(pattern, name))
    yield from (Test(p.name, [p], folder) for p in programs if re.search(pattern, p.name))


def reached(tests, state, jobs):
    """The tests that reach each mutant, the quickest first."""
    def one(test):
        path = state / f'reached-{tests.index(test)}'
        path.unlink(missing_ok=True)
        status, test.seconds = test.run(MUTANTS_REACHED=str(path))
        if status != 0:
            sys.exit(f'{test.name} fails without a mutant')
        data = path.read_bytes() if path.exists() else b''
        return [int.from_bytes(data[at:at + 4], 'little') for at in range(0, len(data), 4)]

    by = collections.defaultdict(list)
    with ThreadPoolExecutor(jobs) as pool:
        for test, mutants in zip(tests, pool.map(one, tests)):
            for n in mutants:
                by[n].append(test)
    for of_mutant in by.values():
        of_mutant.sort(key=lambda test: test.seconds)
    return by


def main():
    arguments = argparse.ArgumentParser()
    arguments.add_argument('tree', type=pathlib.Path)
    arguments.add_argument('package')
    arguments.add_argument('mutants', type=pathlib.Path)
    arguments.add_argument('state', type=pathlib.Path)
    arguments.add_argument('--tests', default='')
    arguments.add_argument('--only', default='')
    arguments.add_argument('--jobs', type=int, default=os.cpu_count())
    arguments.add_argument('--programs', default='')
    arguments.add_argument('--step', choices=('build', 'run'))
    options = arguments.parse_args()
    tree, state = options.tree.resolve(), options.state.resolve()
    mutants = [m for m in json.loads(options.mutants.read_text()) if re.search(options.only, m['name'])]
    for n, m in enumerate(mutants):
        m['n'] = n
    built = state / 'built.json'
    if options.step != 'run':
        pristine = {m['file'] for m in mutants} | {f'{options.package}/src/lib.rs'}
        binaries, left, broken = build(tree, options.package, {p: (tree / p).read_text() for p in pristine}, mutants, state)
        shutil.rmtree(state / 'tests', ignore_errors=True)
        (state / 'tests').mkdir()
        binaries = [shutil.copy(binary, state / 'tests') for binary in binaries]
        programs = state / 'programs'
        shutil.rmtree(programs, ignore_errors=True)
        programs.mkdir()
        subprocess.run(['bash', '-euc', options.programs], cwd=tree, env=os.environ | {'PROGRAMS': str(programs)}, check=True)
        names = [m['name'] for m in mutants]
        built.write_text(json.dumps([names, [pathlib.Path(b).name for b in binaries], left, broken]))
    if options.step == 'build':
        return
    names, binaries, left, broken = json.loads(built.read_text())
    if names != [m['name'] for m in mutants]:
        sys.exit(f'{options.mutants} has other mutants than were built')
    left, broken = ({int(n): why for n, why in of.items()} for of in (left, broken))
    binaries = [state / 'tests' / name for name in binaries]
    programs = sorted((state / 'programs').iterdir())
    live = [m for m in mutants if m['n'] not in left and m['n'] not in broken]
    tests = list(tests_of(binaries, programs, tree / options.package, options.tests))
    by = reached(tests, state, options.jobs)
    print(f'{len(mutants)} mutants; {len(broken)} do not compile, {len(left)} cannot be switched; {len(live)} are tried '
          f'with {len(tests)} tests that take {sum(test.seconds for test in tests):.0f} s', flush=True)
    record = state / 'found.json'
    found = json.loads(record.read_text()) if record.exists() else {}

    def fate(m):
        if found.get(m['name'], '').startswith(('killed', 'no end')):
            return found[m['name']]
        if m['n'] not in by:
            return 'not reached'
        for test in by[m['n']]:
            status, _ = test.run(MUTANT=str(m['n']))
            if status != 0:
                return f'{"no end" if status in (9, 24) else "killed"}: {test.name}'
        return 'survived'

    def one(m):
        found[m['name']] = fate(m)
        if not found[m['name']].startswith(('killed', 'no end')):
            print(f'{found[m["name"]]}: {m["name"]}', flush=True)

    with ThreadPoolExecutor(options.jobs) as pool:
        for i, done in enumerate(as_completed([pool.submit(one, m) for m in live])):
            done.result()
            if i % 20 == 0:
                record.write_text(json.dumps(dict(found), indent=0))
    record.write_text(json.dumps(found, indent=0))
    (state / 'left.json').write_text(json.dumps({mutants[n]['name']: why for n, why in left.items()}, indent=0))
    counts = collections.Counter(found[m['name']].split(':')[0] for m in live)
    print(*(f'{count} {result}' for result, count in counts.items()), sep=', ')


main()
