//! Commands in the emulated host, as a user of the library runs them.
#![allow(clippy::unwrap_used, reason = "only tests call it")]

mod common;

use std::ffi::OsString;
use std::fs;
use std::io::{Read, Write};
use std::os::unix::ffi::OsStringExt;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant, SystemTime};

use common::{engine, read_until, run, script, start, write};
use krun_lab::{Command, Engine, Error, Exact, ExactFile, Source, Stream, WindowSize};

#[test]
fn streams_are_apart_and_the_status_arrives() {
    let Some(engine) = engine() else { return };
    let expected = (37, "out\n".to_owned(), "err\n".to_owned());
    assert_eq!(run(&engine, script("echo out; echo err >&2; exit 37")), expected);
    // KVM is there, for which all this exists.
    assert_eq!(run(&engine, script("test -w /dev/kvm && grep -c svm /proc/cpuinfo")).1, "1\n");
}

#[test]
fn bytes_pass_unchanged_in_both_directions() {
    let Some(engine) = engine() else { return };
    let mut data = vec![0u8; 32 << 20];
    fs::File::open("/dev/urandom").unwrap().read_exact(&mut data).unwrap();
    let (mut typist, stdin) = UnixStream::pair().unwrap();
    let command = Command { stdin: Stream::Fd(stdin.into()), ..Command::new(["cat"]) };
    let (running, mut stdout, _stderr) = start(&engine, command);
    let copy = data.clone();
    let typing = std::thread::spawn(move || typist.write_all(&copy).unwrap());
    let mut got = Vec::new();
    stdout.read_to_end(&mut got).unwrap();
    typing.join().unwrap();
    assert!(got == data, "{} bytes arrived", got.len());
    assert_eq!(running.wait().unwrap(), 0);
}

#[test]
fn a_slow_reader_loses_nothing() {
    let Some(engine) = engine() else { return };
    let (running, mut stdout, _stderr) = start(&engine, script("seq 1 4000000"));
    std::thread::sleep(Duration::from_secs(2));
    let (mut text, mut chunk) = (Vec::new(), vec![0; 1 << 16]);
    loop {
        let n = stdout.read(&mut chunk).unwrap();
        if n == 0 {
            break;
        }
        text.extend_from_slice(&chunk[..n]);
        if text.len() < 4 << 20 {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
    let text = String::from_utf8(text).unwrap();
    assert!(text.lines().zip(1u32..).all(|(line, n)| line == n.to_string()));
    assert_eq!(text.lines().count(), 4_000_000);
    assert_eq!(running.wait().unwrap(), 0);
}

#[test]
fn a_reader_that_goes_away_is_noticed() {
    let Some(engine) = engine() else { return };
    let (running, stdout, mut stderr) = start(&engine, script("yes; echo $? >&2"));
    drop(stdout);
    let mut text = String::new();
    stderr.read_to_string(&mut text).unwrap();
    assert_eq!((running.wait().unwrap(), text.as_str()), (0, "141\n"));
}

#[test]
fn signals_arrive() {
    let Some(engine) = engine() else { return };
    let trap = "trap 'echo usr1' USR1; echo go; while :; do sleep 0.01; done";
    let (running, mut stdout, _stderr) = start(&engine, script(trap));
    read_until(&mut stdout, "go\n");
    running.signal(10).unwrap();
    read_until(&mut stdout, "usr1\n");
    running.signal(15).unwrap();
    assert_eq!(running.wait().unwrap(), 128 + 15);
}

#[test]
fn a_terminal_works_as_one() {
    let Some(engine) = engine() else { return };
    let (mut typist, stdin) = UnixStream::pair().unwrap();
    let text = "stty size; trap 'stty size' WINCH; echo ready; while read word; do echo \"<$word>\"; done; \
        echo over; sh -c 'kill -s INT $$; sleep 9'; echo end; sleep 100";
    let command = Command {
        stdin: Stream::Fd(stdin.into()),
        terminal: Some(WindowSize { rows: 33, cols: 77 }),
        ..Command::new(["bash", "-c", text])
    };
    let (running, mut screen, _) = start(&engine, command);
    assert!(read_until(&mut screen, "ready\r\n").starts_with("33 77\r\n"));
    running.resize(WindowSize { rows: 5, cols: 6 }).unwrap();
    write(&mut typist, "word\n");
    let seen = read_until(&mut screen, "<word>\r\n");
    assert!(seen.contains("word\r\n"), "there is no echo: {seen:?}");
    write(&mut typist, "more\n");
    let seen = seen + &read_until(&mut screen, "<more>\r\n");
    assert!(seen.contains("5 6\r\n"), "{seen:?}");
    write(&mut typist, "\x04");
    read_until(&mut screen, "over\r\n");
    // Control-C reaches the foreground process group.
    std::thread::sleep(Duration::from_millis(200));
    write(&mut typist, "\x03");
    let status = running.wait().unwrap();
    assert_eq!(status, 128 + 2);
}

#[test]
fn what_cannot_be_started_is_told() {
    let Some(engine) = engine() else { return };
    for (command, wanted, word) in [
        (Command::new(["no-such-program"]), 127, "no-such-program"),
        (Command::new(["/etc"]), 126, "directory"),
        (Command { cwd: "/no/such/place".into(), ..script("true") }, 125, "/no/such/place"),
    ] {
        match engine.run(command) {
            Err(Error::Command { status, reason }) => {
                assert_eq!(status, wanted);
                assert!(reason.contains(word), "{reason}");
            }
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn only_writable_directories_are_written() {
    let Some(engine) = engine() else { return };
    let home = tempfile::tempdir().unwrap();
    // A comma ends a value in QEMU's options, and a name need not be text.
    let odd = home.path().join(OsString::from_vec(b"a,b\xff".to_vec()));
    let (inner, plain) = (odd.join("inner"), home.path().join("plain"));
    fs::create_dir_all(&inner).unwrap();
    fs::create_dir(&plain).unwrap();
    fs::write(plain.join("old"), "old").unwrap();
    let text =
        "cat \"$2/old\"; echo new >\"$1/new\"; echo lost >\"$2/lost\"; mkdir \"$1/inner/d\"; touch /etc/x";
    let mut command = script(text);
    command.argv.extend(["sh".into(), odd.clone().into(), plain.clone().into()]);
    command.writable = vec![inner.clone(), odd.clone()];
    let (status, out, err) = run(&engine, command);
    assert_eq!((status, out.as_str()), (1, "old"));
    assert!(err.contains("Read-only file system"), "{err}");
    assert_eq!(fs::read_to_string(odd.join("new")).unwrap(), "new\n");
    assert!(inner.join("d").is_dir());
    // It went to memory: the directory lies in /tmp.
    assert!(!plain.starts_with("/tmp") || !plain.join("lost").exists());
}

#[test]
fn bytes_that_are_no_text_survive() {
    let Some(engine) = engine() else { return };
    let odd = OsString::from_vec(b"\xff \x01'".to_vec());
    let mut command = script("printf %s \"$1$K\" | od -An -tx1");
    command.argv.extend(["sh".into(), odd.clone()]);
    command.env.push(("K".into(), odd));
    assert_eq!(run(&engine, command).1, " ff 20 01 27 ff 20 01 27\n");
    // More than one message holds.
    let mut command = script("echo ${#1}");
    command.argv.extend(["sh".into(), "x".repeat(100_000).into()]);
    assert_eq!(run(&engine, command).1, "100000\n");
}

#[test]
fn every_run_has_its_own_time_and_random_numbers() {
    let Some(engine) = engine() else { return };
    let ask = || {
        let (_, out, _) =
            run(&engine, script("date +%s; od -An -tx8 -N16 /dev/urandom; cat /proc/sys/kernel/hostname"));
        let mut lines = out.lines().map(str::to_owned);
        let mut next = || lines.next().unwrap();
        (next().parse::<u64>().unwrap(), next(), next())
    };
    let now = || SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs();
    let first = ask();
    let before = now();
    let second = ask();
    let after = now();
    // Its clock is set to the second.
    let around = before - 1..=after + 1;
    assert!(around.contains(&second.0), "{} is not in {around:?}", second.0);
    assert_ne!(first.1, second.1);
    assert_eq!(second.2, fs::read_to_string("/proc/sys/kernel/hostname").unwrap().trim());
}

#[test]
fn time_passes_at_the_right_speed() {
    let Some(engine) = engine() else { return };
    let (running, mut stdout, _stderr) = start(&engine, script("echo a; sleep 2; echo b"));
    read_until(&mut stdout, "a\n");
    let before = Instant::now();
    read_until(&mut stdout, "b\n");
    let passed = before.elapsed();
    assert!(passed > Duration::from_millis(1900) && passed < Duration::from_secs(4), "{passed:?}");
    assert_eq!(running.wait().unwrap(), 0);
}

#[test]
fn a_broken_template_costs_a_boot_and_nothing_else() {
    let Some(engine) = engine() else { return };
    let cache = tempfile::tempdir().unwrap();
    let engine = Engine { cache: Some(cache.path().into()), memory_mib: 512, ..engine };
    let dir = engine.prepare().unwrap();
    assert_eq!(run(&engine, script("echo a")), (0, "a\n".into(), String::new()));
    let mut state = fs::read(dir.join("state")).unwrap();
    let middle = state.len() / 2;
    state.truncate(middle);
    fs::write(dir.join("state"), &state).unwrap();
    assert_eq!(run(&engine, script("echo b")), (0, "b\n".into(), String::new()));
    assert!(!dir.join("state").exists());
    // No template can be made where nothing can be written.
    let nowhere = Engine { cache: Some("/proc/no".into()), ..engine };
    assert_eq!(run(&nowhere, script("echo c")), (0, "c\n".into(), String::new()));
    assert!(nowhere.prepare().is_err());
}

#[test]
fn standard_error_can_be_apart_from_the_terminal() {
    let Some(engine) = engine() else { return };
    let terminal = Some(WindowSize { rows: 24, cols: 80 });
    let text = "test -t 0 && test -t 1 && ! test -t 2 && echo yes; echo apart >&2";
    assert_eq!(
        run(&engine, Command { terminal, ..script(text) }),
        (0, "yes\r\n".to_owned(), "apart\n".to_owned())
    );
}

#[test]
fn the_root_can_be_writable() {
    let Some(engine) = engine() else { return };
    let home = tempfile::tempdir().unwrap();
    let mut command = script("echo new >\"$1/new\"");
    command.argv.extend(["sh".into(), home.path().into()]);
    command.writable = vec!["/".into(), home.path().into()];
    assert_eq!(run(&engine, command), (0, String::new(), String::new()));
    assert_eq!(fs::read_to_string(home.path().join("new")).unwrap(), "new\n");
}

/// A program of this machine with the libraries it needs.
fn program(path: &str) -> Vec<ExactFile> {
    let out = std::process::Command::new("ldd").arg(path).output().unwrap();
    let text = String::from_utf8(out.stdout).unwrap();
    let libraries = text.split_whitespace().filter(|word| word.starts_with('/'));
    let file = |path: &str| ExactFile { path: path.into(), source: Source::Host(path.into()), mode: None };
    libraries.chain([path]).map(file).collect()
}

#[test]
fn exact_runs_are_the_same() {
    let Some(engine) = engine() else { return };
    let script = b"show() { while read -r line; do echo \"$line\"; done; }
        show </proc/uptime; show </data/sub/file; show </proc/timer_list; show </proc/interrupts; echo err >&2; exit 143";
    let file = |path: &str, bytes: &[u8]| ExactFile {
        path: path.into(),
        source: Source::Bytes(bytes.to_vec()),
        mode: None,
    };
    let mut files = program("/bin/sh");
    files.extend([file("/script", script), file("/data/sub/file", b"\xff\n")]);
    let argv = ["/bin/sh", "/script"].map(OsString::from).into();
    let command = Exact { argv, env: vec![("PATH".into(), "/bin".into())], files };
    let engine = Engine { memory_mib: 512, ..engine };
    let (first, second) = (engine.run_exact(&command).unwrap(), engine.run_exact(&command).unwrap());
    assert_eq!(first.0, 143, "{}", String::from_utf8_lossy(&first.1));
    assert_eq!(String::from_utf8_lossy(&first.1), String::from_utf8_lossy(&second.1));
    assert!(first.1.ends_with(b"err\n"));
    let missing = Exact { argv: vec!["nothing".into()], ..command };
    let (status, printed) = engine.run_exact(&missing).unwrap();
    let printed = String::from_utf8_lossy(&printed);
    assert_eq!((status, printed.trim()), (127, "krun: nothing does not exist in the guest."));
}

#[test]
fn a_kernel_that_does_not_boot_is_told() {
    let Some(engine) = engine() else { return };
    let dir = tempfile::tempdir().unwrap();
    let kernel = dir.path().join("kernel");
    fs::write(&kernel, "no kernel").unwrap();
    let broken = Engine { kernel, cache: None, ..engine.clone() };
    let error = broken.run(script("true")).unwrap_err().to_string();
    assert!(error.contains("the machine ended before"), "{error}");
    assert!(error.contains("kernel"), "QEMU's reason is missing: {error}");
    let missing = Engine::new(&dir.path().join("missing"), Vec::new()).unwrap_err().to_string();
    assert!(missing.contains("missing") && missing.contains("cannot be read"), "{missing}");
    let no_init = Engine { init: b"no program".to_vec(), cache: None, ..engine };
    let error = no_init.run(script("true")).unwrap_err().to_string();
    assert!(error.contains("Kernel panic"), "{error}");
}
