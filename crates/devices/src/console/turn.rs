//! In which order the guest learns of the terminals of several devices.
//!
//! Linux numbers terminals (`hvc0`, `hvc1`) as it finds them, and listens to several devices side by side. So a device
//! tells of its ports once the terminals of the device before it have their numbers.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::sys::Timer;

/// How long a device has for its terminals, from when its turn has come. A driver that takes the device into service and
/// leaves its terminals alone is none of Linux's, which needs some milliseconds.
const PATIENCE: Duration = Duration::from_secs(5);
/// At once, for a timer.
const NOW: Duration = Duration::from_nanos(1);

/// One device.
#[derive(Debug, Default)]
struct Place {
    /// The device that comes before.
    before: Option<usize>,
    /// Since when its terminals have their numbers.
    numbered: Option<Instant>,
    /// Since when it waits for its turn.
    asked: Option<Instant>,
    /// When its turn came.
    came: Option<Instant>,
    /// Wakes it.
    timer: Option<Arc<Timer>>,
}

/// All devices whose terminals are numbered in order. Each comes after those before it.
#[derive(Debug)]
struct Order(Vec<Place>);

impl Order {
    /// When the turn of a device came, or else when to look again. The turn of one that no driver serves comes as well:
    /// otherwise those after it would wait for ever.
    fn came(&mut self, at: usize, now: Instant) -> Result<Instant, Instant> {
        let place = &self.0[at];
        let (asked, known) = (place.asked, place.came);
        let came = match (known, place.before) {
            (Some(came), _) => came,
            // The first one's, with the first question.
            (None, None) => now,
            (None, Some(before)) => match self.0[before].numbered {
                Some(since) => since,
                None => {
                    let begin = self.came(before, now)?;
                    let end = asked.map_or(begin, |asked| asked.max(begin)) + PATIENCE;
                    if now < end {
                        return Err(end);
                    }
                    end
                }
            },
        };
        self.0[at].came = Some(came);
        Ok(came)
    }

    /// The device asks for its turn: nothing if it has come, else when to ask again.
    fn ask(&mut self, at: usize, now: Instant) -> Option<Instant> {
        self.0[at].asked.get_or_insert(now);
        self.came(at, now).err()
    }

    /// A driver begins anew with the device.
    fn restart(&mut self, at: usize) {
        let place = &mut self.0[at];
        (place.numbered, place.asked, place.came) = (None, None, None);
    }
}

fn lock(order: &Mutex<Order>) -> MutexGuard<'_, Order> {
    // No method leaves it half changed.
    order.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Whether the terminals of one device have their numbers. Clones are about the same device.
#[derive(Debug, Clone)]
pub struct Numbered {
    order: Arc<Mutex<Order>>,
    at: usize,
}

/// Of a device that comes after no other.
impl Default for Numbered {
    fn default() -> Self {
        Self { order: Arc::new(Mutex::new(Order(vec![Place::default()]))), at: 0 }
    }
}

impl Numbered {
    /// They have, or have not, or not any more.
    pub(crate) fn set(&self, numbered: bool) {
        let mut order = lock(&self.order);
        let since = &mut order.0[self.at].numbered;
        if !numbered {
            *since = None;
        } else if since.is_none() {
            *since = Some(Instant::now());
            // It may be the turn of any of them, or the time may have changed that it waits for.
            let waiting = order.0.iter().filter(|place| place.asked.is_some() && place.came.is_none());
            for timer in waiting.filter_map(|place| place.timer.as_ref()) {
                if let Err(e) = timer.set(NOW) {
                    tracing::debug!("a console waits longer than it must: {e}");
                }
            }
        }
    }

    /// The driver has left the device.
    pub(crate) fn restart(&self) {
        lock(&self.order).restart(self.at);
    }

    /// The turn of a device that comes after this one.
    ///
    /// # Errors
    /// No descriptor is left.
    pub fn next(&self) -> io::Result<Turn> {
        let timer = Arc::new(Timer::new()?);
        let mut order = lock(&self.order);
        let place = Place { before: Some(self.at), timer: Some(Arc::clone(&timer)), ..Place::default() };
        order.0.push(place);
        Ok(Turn { order: Arc::clone(&self.order), at: order.0.len() - 1, timer })
    }
}

/// A device's turn. Its descriptor is readable when it is time to ask again whether it has come.
#[derive(Debug)]
pub struct Turn {
    order: Arc<Mutex<Order>>,
    at: usize,
    timer: Arc<Timer>,
}

impl Turn {
    /// Whether the terminals of the device whose turn this is have their numbers.
    pub(crate) fn numbered(&self) -> Numbered {
        Numbered { order: Arc::clone(&self.order), at: self.at }
    }

    /// A driver takes the device into service: from the beginning.
    pub(crate) fn restart(&mut self) {
        lock(&self.order).restart(self.at);
    }

    /// Whether it has come. The first call begins the wait, which ends sooner or later.
    pub(crate) fn has_come(&mut self) -> io::Result<bool> {
        // Held meanwhile, or the other device could be done between the look and the timer.
        let mut order = lock(&self.order);
        let now = Instant::now();
        let Some(end) = order.ask(self.at, now) else { return Ok(true) };
        self.timer.set(end.saturating_duration_since(now).max(NOW))?;
        Ok(false)
    }

    /// After the descriptor was readable, before the next question.
    pub(crate) fn look(&mut self) {
        self.timer.take();
    }
}

impl AsFd for Turn {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.timer.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};

    use super::*;

    fn is_ready(turn: &Turn, seconds: i64) -> bool {
        let time = Timespec { tv_sec: seconds, tv_nsec: 0 };
        poll(&mut [PollFd::new(turn, PollFlags::IN)], Some(&time)).unwrap() > 0
    }

    #[test]
    fn who_comes_next_is_woken_and_need_not_wait_again() {
        let first = Numbered::default();
        let mut turns = [first.next().unwrap(), first.next().unwrap()];
        assert!(!turns[0].has_come().unwrap() && !turns[0].has_come().unwrap());
        assert!(!is_ready(&turns[0], 0));
        first.set(true);
        assert!(is_ready(&turns[0], 20));
        turns[0].look();
        assert!(turns[0].has_come().unwrap());
        // One that had not asked is told the same.
        assert!(turns[1].has_come().unwrap());
        // What was once is not what is now.
        first.set(false);
        assert!(turns[0].has_come().unwrap());
        turns[0].restart();
        assert!(!turns[0].has_come().unwrap());
    }

    #[test]
    fn no_wait_lasts_for_ever() {
        let first = Numbered::default();
        let mut turn = first.next().unwrap();
        assert!(!turn.has_come().unwrap() && is_ready(&turn, 20));
        turn.look();
        assert!(turn.has_come().unwrap());
    }

    fn chain(len: usize) -> Order {
        let place = |n: usize| Place { before: n.checked_sub(1), ..Place::default() };
        Order((0..len).map(place).collect())
    }

    #[test]
    fn the_time_of_each_device_begins_with_its_turn() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        // All begin at once, and the first one never gets done.
        let mut order = chain(4);
        for n in [3, 1, 2] {
            assert_eq!(order.ask(n, at(0)), Some(at(5)));
        }
        assert_eq!((order.ask(2, at(5)), order.ask(1, at(5))), (Some(at(10)), None));
        // The second one has begun now, and may take as long as any.
        assert_eq!(order.ask(3, at(9)), Some(at(10)));
        order.0[1].numbered = Some(at(9));
        assert_eq!((order.ask(3, at(9)), order.ask(2, at(9))), (Some(at(14)), None));
        // The third one never gets done either.
        assert_eq!((order.ask(3, at(13)), order.ask(3, at(14))), (Some(at(14)), None));
    }

    #[test]
    fn a_device_that_nobody_serves_has_its_time_too() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut order = chain(3);
        // The second one never asks.
        assert_eq!(order.ask(2, at(0)), Some(at(5)));
        order.0[0].numbered = Some(at(1));
        assert_eq!((order.ask(2, at(1)), order.ask(2, at(6))), (Some(at(6)), None));
        // Not even the first one gets done: so many times the patience, and no more.
        let mut order = chain(9);
        assert_eq!((order.ask(8, at(0)), order.ask(8, at(39))), (Some(at(5)), Some(at(40))));
        assert_eq!(order.ask(8, at(40)), None);
        // With another driver everything begins anew, for the one that asks later too.
        (0..9).for_each(|n| order.restart(n));
        assert_eq!((order.ask(1, at(100)), order.ask(8, at(101))), (Some(at(105)), Some(at(105))));
    }

    #[test]
    fn everybody_who_waits_hears_of_it() {
        let first = Numbered::default();
        let mut second = first.next().unwrap();
        let mut third = second.numbered().next().unwrap();
        assert!(!third.has_come().unwrap() && !second.has_come().unwrap());
        first.set(true);
        assert!(is_ready(&second, 1) && is_ready(&third, 1));
        third.look();
        assert!(second.has_come().unwrap() && !third.has_come().unwrap());
        second.numbered().set(true);
        assert!(is_ready(&third, 1) && third.has_come().unwrap());
    }
}
