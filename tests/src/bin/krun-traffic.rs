//! Connections to measure or to count: the server, and clients that say how many exchanges they had in a second.
//!
//! ```text
//! krun-traffic serve ADDRESS PORT                         answers each byte with itself
//! krun-traffic answers ADDRESS PORT SECONDS               one byte there and back, again and again
//! krun-traffic connections ADDRESS PORT SECONDS AT_ONCE   a connection for each byte, which the server closes
//! ```
//! A client that meets an error says so and ends with status 1.

use std::io::{Error, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::ExitCode;
use std::thread;
use std::time::{Duration, Instant};

/// How long an answer may take.
const PATIENCE: Duration = Duration::from_secs(30);
/// Connections that the server serves at the same time.
const SERVERS: usize = 16;
/// A byte that the server answers and closes the connection after, and one after which it goes on.
const LAST: u8 = b'L';
const MORE: u8 = b'M';

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    match run(&words) {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => {
            eprintln!("krun-traffic: {why}");
            ExitCode::FAILURE
        }
    }
}

fn run(words: &[&str]) -> Result<(), String> {
    let number = |word: &str| word.parse::<u16>().map_err(|_| format!("{word} is no number"));
    let rate = match *words {
        ["serve", address, port] => return serve((address, number(port)?)),
        ["answers", address, port, seconds] => answers((address, number(port)?), number(seconds)?)?,
        ["connections", address, port, seconds, at_once] => {
            connections((address, number(port)?), number(seconds)?, number(at_once)?)?
        }
        _ => return Err("serve, answers or connections, an address and a port".into()),
    };
    println!("{rate:.1}");
    Ok(())
}

fn serve(at: (&str, u16)) -> Result<(), String> {
    let listener = TcpListener::bind(at).map_err(|e| format!("{at:?}: {e}"))?;
    thread::scope(|scope| {
        for _ in 0..SERVERS {
            scope.spawn(|| listener.incoming().flatten().for_each(|stream| drop(answer(stream))));
        }
    });
    Ok(())
}

fn answer(mut stream: TcpStream) -> Result<(), Error> {
    stream.set_nodelay(true)?;
    let mut byte = [MORE];
    while byte == [MORE] && stream.read(&mut byte)? > 0 {
        stream.write_all(&byte)?;
    }
    Ok(())
}

fn connect(to: (&str, u16)) -> Result<TcpStream, Error> {
    let stream = TcpStream::connect(to)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    Ok(stream)
}

fn exchange(stream: &mut TcpStream, byte: u8) -> Result<(), Error> {
    let mut seen = [0];
    stream.write_all(&[byte])?;
    stream.read_exact(&mut seen)?;
    if seen == [byte] { Ok(()) } else { Err(Error::other(format!("{seen:?} for {byte}"))) }
}

/// Repeats `one` until so many seconds have passed; how often a second that was.
fn repeat(seconds: u16, mut one: impl FnMut() -> Result<(), Error>) -> Result<f64, String> {
    let (start, mut count) = (Instant::now(), 0u32);
    while start.elapsed() < Duration::from_secs(seconds.into()) {
        one().map_err(|e| format!("after {count}: {e}"))?;
        count += 1;
    }
    Ok(f64::from(count) / start.elapsed().as_secs_f64())
}

fn answers(to: (&str, u16), seconds: u16) -> Result<f64, String> {
    let mut stream = connect(to).map_err(|e| e.to_string())?;
    repeat(seconds, || exchange(&mut stream, MORE))
}

fn connections(to: (&str, u16), seconds: u16, at_once: u16) -> Result<f64, String> {
    let one = || {
        let mut stream = connect(to)?;
        exchange(&mut stream, LAST)?;
        // The server closes first, so that no port of the guest stays taken.
        match stream.read(&mut [0])? {
            0 => Ok(()),
            _ => Err(Error::other("more than the answer")),
        }
    };
    thread::scope(|scope| {
        let clients: Vec<_> = (0..at_once).map(|_| scope.spawn(|| repeat(seconds, one))).collect();
        clients.into_iter().map(|c| c.join().map_err(|_| "a client panicked".to_owned())?).sum()
    })
}
