//! Output, both directions at once, and the end of the VM.

use super::*;

fn owned(f: impl Into<OwnedFd>) -> Option<OwnedFd> {
    Some(f.into())
}

#[test]
fn a_full_pipe_holds_its_own_port_up_and_no_other() {
    let (out, mut r) = output("out");
    let (err, mut r2) = output("err");
    let mut g = Guest::new(vec![out, err]);
    g.boot();
    let data = noise(150_000, 3);
    for part in data.chunks(30_000) {
        g.send(0, part);
    }
    let mut sent = 0;
    while g.sent(0) {
        sent += 1;
    }
    assert!((1..5).contains(&sent), "{sent}");
    assert_eq!(g.poll(), 0, "a full pipe is not ready");
    g.send(1, b"still here");
    assert!(g.sent(1));
    let mut small = [0; 10];
    r2.read_exact(&mut small).unwrap();
    assert_eq!(&small, b"still here");
    let mut got = Vec::new();
    while got.len() < data.len() {
        let mut part = vec![0; available(&r) as usize];
        r.read_exact(&mut part).unwrap();
        got.extend(part);
        g.poll();
    }
    assert_eq!(got, data);
    assert!(g.sent(0));
    assert_eq!(g.poll(), 0, "an output with nothing to write is not watched");
}

#[test]
fn a_reader_that_goes_away_takes_the_port_along() {
    let (out, r) = output("out");
    let mut g = Guest::new(vec![out]);
    g.boot();
    g.send(0, b"x");
    assert!(g.sent(0));
    drop(r);
    g.send(0, b"y");
    assert_eq!(g.events(), [(0, PORT_REMOVE, 0)]);
    for _ in 0..3 {
        g.send(0, b"z");
    }
    assert!((0..4).all(|_| g.sent(0)), "what is sent afterwards comes back");
    assert!(g.told().is_empty());
    assert_eq!(g.poll(), 0);
}

#[test]
fn a_reader_that_goes_away_from_a_full_pipe() {
    let (out, r) = output("out");
    let mut g = Guest::new(vec![out]);
    g.boot();
    for _ in 0..4 {
        g.send(0, &[1; 30_000]);
    }
    drop(r);
    assert_eq!(g.poll(), 1);
    assert_eq!(g.events(), [(0, PORT_REMOVE, 0)]);
    assert!((0..4).all(|_| g.sent(0)));
    assert_eq!(g.poll(), 0);
}

#[test]
fn output_to_nowhere_comes_back() {
    let mut g = Guest::new(vec![console()]);
    g.boot();
    g.send(0, b"log");
    assert!(g.sent(0));
}

#[test]
fn a_log_on_a_full_disk_loses_lines_but_a_stream_ends() {
    let full = || File::options().write(true).open("/dev/full").unwrap().into();
    let mut g = Guest::new(vec![
        PortSpec::console(None, Some(full()), None),
        PortSpec::stream("out", None, Some(full())),
    ]);
    g.boot();
    g.send(0, b"line");
    assert!(g.sent(0));
    assert!(g.told().is_empty());
    g.send(1, b"data");
    assert!(g.sent(1));
    assert_eq!(g.events(), [(1, PORT_REMOVE, 0)]);
}

#[test]
fn drain_writes_everything_to_slow_readers() {
    let (out, mut r) = output("out");
    let (err, mut r2) = output("err");
    let (gone, r3) = output("gone");
    let mut g = Guest::new(vec![out, err, gone]);
    g.boot();
    let data = noise(300_000, 4);
    let parts: Vec<&[u8]> = data.chunks(30_000).collect();
    for part in &parts[..5] {
        g.send(0, part);
    }
    // Made available without a notification, as by a guest that ends at once.
    for part in &parts[5..] {
        g.h.add(queues(0).1, &[part], &[]);
        g.h.add(queues(1).1, &[part], &[]);
        g.h.add(queues(2).1, &[part], &[]);
    }
    drop(r3);
    let reader = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(30));
        let (mut all, mut all2) = (vec![0; 300_000], vec![0; 150_000]);
        r2.read_exact(&mut all2).unwrap();
        r.read_exact(&mut all).unwrap();
        (all, all2)
    });
    g.h.drain().unwrap();
    let (all, all2) = reader.join().unwrap();
    assert_eq!(all, data);
    assert_eq!(all2, data[150_000..]);
}

#[test]
fn drain_can_be_given_up() {
    let (out, _r) = output("out");
    let c = Console::new(ConsoleSpec { ports: vec![out] }).unwrap();
    let handle = c.handle();
    let mut g = Guest::of(c);
    g.boot();
    for _ in 0..4 {
        g.send(0, &[1; 30_000]);
    }
    let waker = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(30));
        handle.resize(0, 1, 1);
        handle.refresh();
        std::thread::sleep(Duration::from_millis(10));
        handle.abandon();
    });
    g.h.drain().unwrap();
    waker.join().unwrap();
    assert!(g.h.held(queues(0).1) > 0, "it was blocked");
}

#[test]
fn drain_does_not_wait_for_a_port_that_is_read_after_the_end() {
    let (out, mut r) = output("out");
    let (mut control, held) = output("control");
    control.waited_for = false;
    let mut g = Guest::new(vec![control, out]);
    g.boot();
    for _ in 0..4 {
        g.send(0, &[1; 30_000]);
    }
    g.h.add(queues(1).1, &[b"last words"], &[]);
    g.h.drain().unwrap();
    let mut said = [0; 10];
    r.read_exact(&mut said).unwrap();
    assert_eq!(&said, b"last words");
    assert!(available(&held) > 30_000, "what fits has arrived");
}

#[test]
fn sixty_four_mebibytes_arrive_identical_both_ways() {
    const TOTAL: usize = 64 << 20;
    let (host_in, guest_in) = pipe().unwrap();
    let (guest_out, host_out) = pipe().unwrap();
    let mut g = Guest::new(vec![PortSpec::stream("cat", owned(host_in), owned(host_out))]);
    g.boot();
    let feeder = std::thread::spawn(move || {
        let mut to = guest_in;
        for n in 0..TOTAL >> 16 {
            to.write_all(&noise(1 << 16, n as u64)).unwrap();
        }
    });
    let checker = std::thread::spawn(move || {
        let mut from = guest_out;
        let mut part = vec![0; 1 << 16];
        for n in 0..TOTAL >> 16 {
            from.read_exact(&mut part).unwrap();
            assert!(part == noise(1 << 16, n as u64), "block {n}");
        }
        from.read(&mut part).unwrap()
    });
    let (mut total, mut backlog) = (0, Vec::new());
    while total < TOTAL || !backlog.is_empty() {
        g.h.poll(Duration::from_millis(if backlog.is_empty() { 50 } else { 0 })).unwrap();
        while g.sent(0) {}
        let part = g.receive(0, true);
        total += part.len();
        backlog.extend(part);
        let whole = backlog.len() - if total < TOTAL { backlog.len() % 8192 } else { 0 };
        let mut done = 0;
        while done < whole && g.h.driver(1).in_flight() < usize::from(OUTPUT_QUEUE) {
            let n = (whole - done).min(24 << 10);
            g.send(0, &backlog[done..done + n]);
            done += n;
        }
        backlog.drain(..done);
    }
    g.h.drain().unwrap();
    feeder.join().unwrap();
    g.receive(0, true);
    g.poll();
    assert_eq!(g.events(), [(0, PORT_OPEN, 0)]);
    drop(g);
    assert_eq!(checker.join().unwrap(), 0, "and then the end");
}

/// The same on a thread of its own, through the registers: pulses, doorbells and the end of the VM.
#[test]
fn on_a_worker_thread() {
    use krun_virtio::mock::MmioDriver;
    let (stdin, mut w) = input("in");
    let (out, mut r) = output("out");
    let mut d = MmioDriver::new(Console::new(ConsoleSpec { ports: vec![stdin, out] }).unwrap());
    d.start(u64::MAX);
    for queue in [0, CONTROL_RX] {
        for _ in 0..16 {
            assert!(d.add(queue, &[], &[PAGE]));
            d.kick(queue);
        }
    }
    for (id, event) in [(0, DEVICE_READY), (0, PORT_READY), (1, PORT_READY), (0, PORT_OPEN)] {
        assert!(d.add(CONTROL_TX, &[&[id, 0, 0, 0, event as u8, 0, 1, 0]], &[]));
        d.kick(CONTROL_TX);
        d.wait_used(CONTROL_TX, SOON).unwrap();
    }
    w.write_all(b"hello").unwrap();
    drop(w);
    assert_eq!(d.wait_used(0, SOON).unwrap().data, b"hello");
    let mut last = [0; 8];
    for _ in 0..7 {
        last.copy_from_slice(&d.wait_used(CONTROL_RX, SOON).unwrap().data[..8]);
        if last[4] == PORT_OPEN as u8 && last[6] == 0 {
            panic!("the end before the data was read");
        }
        if last[4] == PORT_NAME as u8 && last[0] == 1 {
            break;
        }
    }
    assert!(d.add(0, &[], &[PAGE]));
    d.kick(0);
    assert_eq!(d.wait_used(CONTROL_RX, SOON).unwrap().data, [0, 0, 0, 0, PORT_OPEN as u8, 0, 0, 0]);
    // Without a doorbell: only the drain finds it.
    let (tx, data) = (queues(1).1, noise(100_000, 5));
    assert!(d.add(tx, &[&data], &[]));
    let reader = std::thread::spawn(move || {
        let mut all = Vec::new();
        r.read_to_end(&mut all).unwrap();
        all
    });
    d.transport().shutdown(true).unwrap();
    assert!(d.failures().is_empty());
    drop(d);
    assert_eq!(reader.join().unwrap(), data);
}
