//! A back end with which features were agreed.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::Instant;

use krun_event::Wake;
use krun_virtio::QueueAddresses;

use super::channel::{Channel, ChannelError};
use super::message::{
    F_PROTOCOL_FEATURES, InflightArea, Protocol, Region, Request, memory_table, ring_addresses, u32_at, words,
};
use super::requests::Requests;

/// A back end and what was agreed.
#[derive(Debug)]
pub struct Session {
    pub channel: Channel,
    /// Feature bits offered, those of the protocol among them.
    pub features: u64,
    pub protocol: Protocol,
    /// How many queues the back end has, if it says so.
    pub queues: Option<u64>,
    /// What the back end asks of us.
    pub requests: Option<Requests>,
}

/// A ring that the back end is to serve.
#[derive(Debug)]
pub struct Ring<'a> {
    pub queue: u32,
    pub size: u16,
    pub at: QueueAddresses,
    /// Index of the first available entry that it takes.
    pub base: u16,
    pub kick: &'a Wake,
}

/// Memory in which the back end notes requests under way, kept for the next one. Never looked at.
#[derive(Debug)]
pub struct Inflight {
    area: InflightArea,
    fd: OwnedFd,
}

/// All that starts a device.
#[derive(Debug)]
pub struct Setup<'a> {
    /// Accepted by the guest's driver.
    pub features: u64,
    pub memory: &'a [(Region, BorrowedFd<'a>)],
    pub rings: &'a [Ring<'a>],
    /// Set by the back end when it has used a buffer.
    pub call: &'a Wake,
    /// Set by the back end when a ring is broken.
    pub error: &'a Wake,
    pub inflight: Option<&'a Inflight>,
}

impl Session {
    /// Connects to the back end at `path` and agrees on what both know, by `deadline`, unless `cancel` is set.
    pub fn open(path: &Path, deadline: Instant, cancel: Wake) -> io::Result<Result<Self, ChannelError>> {
        Ok(Self::negotiate(Channel::connect(path, deadline, cancel)?))
    }

    pub fn negotiate(mut channel: Channel) -> Result<Self, ChannelError> {
        channel.tell(Request::SetOwner, &[])?;
        let features = channel.ask_u64(Request::GetFeatures)?;
        let mut session =
            Self { channel, features, protocol: Protocol::empty(), queues: None, requests: None };
        if features & F_PROTOCOL_FEATURES != 0 {
            session.negotiate_protocol()?;
        }
        Ok(session)
    }

    fn negotiate_protocol(&mut self) -> Result<(), ChannelError> {
        let channel = &mut self.channel;
        let offered = channel.ask_u64(Request::GetProtocolFeatures)?;
        self.protocol = Protocol::from_bits_truncate(offered);
        channel.tell(Request::SetProtocolFeatures, &self.protocol.bits().to_ne_bytes())?;
        channel.acknowledges = self.protocol.contains(Protocol::REPLY_ACK);
        if self.protocol.contains(Protocol::MQ) {
            self.queues = Some(channel.ask_u64(Request::GetQueueNum)?);
        }
        if self.protocol.contains(Protocol::BACKEND_REQ) {
            let request = Request::SetBackendReqFd;
            let (ours, theirs) = Requests::pair().map_err(|source| ChannelError::Host { request, source })?;
            channel.pass(request, &[], &[theirs.as_fd()])?;
            self.requests = Some(ours);
        }
        Ok(())
    }

    fn has_protocol(&self) -> bool {
        self.features & F_PROTOCOL_FEATURES != 0
    }

    /// The first `len` bytes of the configuration space.
    pub fn config(&mut self, len: usize) -> Result<Vec<u8>, ChannelError> {
        const HEAD: usize = 12;
        let request = Request::GetConfig;
        let mut payload = words::<3, HEAD>(&[0, len as u32, 0]).to_vec();
        payload.resize(HEAD + len, 0);
        let mut answer = self.channel.ask(request, &payload)?;
        // An answer without contents is how a back end says that it has not so much.
        if answer.is_empty() || u32_at(&answer, 4) == 0 {
            return Err(ChannelError::Refused { request, code: 0 });
        }
        if answer.len() != HEAD + len || u32_at(&answer, 0) != 0 || u32_at(&answer, 4) as usize != len {
            let why = format!("{} bytes, not {}, or another part of it", answer.len(), HEAD + len);
            return Err(self.channel.give_up(ChannelError::Answer { request, why }));
        }
        Ok(answer.split_off(HEAD))
    }

    /// Writes to the configuration space.
    pub fn set_config(&mut self, offset: u32, data: &[u8]) -> Result<(), ChannelError> {
        let mut payload = words::<3, 12>(&[offset, data.len() as u32, 0]).to_vec();
        payload.extend(data);
        self.channel.tell(Request::SetConfig, &payload)
    }

    /// Asks for memory to note requests in, if the back end does that.
    pub fn inflight(&mut self, queues: u16, queue_size: u16) -> Result<Option<Inflight>, ChannelError> {
        if !self.protocol.contains(Protocol::INFLIGHT) {
            return Ok(None);
        }
        let request = Request::GetInflightFd;
        let area = InflightArea { queues, queue_size, ..InflightArea::default() };
        let (answer, fd) = self.channel.ask_fd(request, &area.encode())?;
        let area = InflightArea::decode(&answer);
        match fd {
            Some(fd) if answer.len() == InflightArea::LEN && area.size > 0 => Ok(Some(Inflight { area, fd })),
            _ => {
                let why = "no memory with it".into();
                Err(self.channel.give_up(ChannelError::Answer { request, why }))
            }
        }
    }

    /// Hands the rings over. The back end starts with each at the first kick.
    pub fn start(&mut self, setup: &Setup<'_>) -> Result<(), ChannelError> {
        let protocol = if self.has_protocol() { F_PROTOCOL_FEATURES } else { 0 };
        let channel = &mut self.channel;
        channel.tell(Request::SetFeatures, &(setup.features | protocol).to_ne_bytes())?;
        let regions: Vec<_> = setup.memory.iter().map(|(region, _)| *region).collect();
        let fds: Vec<_> = setup.memory.iter().map(|(_, fd)| *fd).collect();
        channel.pass(Request::SetMemTable, &memory_table(&regions), &fds)?;
        if let Some(inflight) = setup.inflight {
            channel.pass(Request::SetInflightFd, &inflight.area.encode(), &[inflight.fd.as_fd()])?;
        }
        for ring in setup.rings {
            let state = |value: u32| words::<2, 8>(&[ring.queue, value]);
            let number = u64::from(ring.queue).to_ne_bytes();
            channel.tell(Request::SetVringNum, &state(ring.size.into()))?;
            channel.tell(Request::SetVringBase, &state(ring.base.into()))?;
            let QueueAddresses { desc, avail, used } = ring.at;
            channel.tell(Request::SetVringAddr, &ring_addresses(ring.queue, desc, used, avail))?;
            channel.pass(Request::SetVringCall, &number, &[setup.call.as_fd()])?;
            channel.pass(Request::SetVringErr, &number, &[setup.error.as_fd()])?;
            channel.pass(Request::SetVringKick, &number, &[ring.kick.as_fd()])?;
        }
        if self.has_protocol() {
            setup.rings.iter().try_for_each(|ring| self.enable(ring.queue, true))?;
        }
        if !self.channel.acknowledges {
            // Any question that is answered will do: then all before it is done. Some back ends take a kick that comes
            // before a ring is enabled and forget it.
            self.channel.ask_u64(Request::GetFeatures)?;
        }
        Ok(())
    }

    fn enable(&mut self, queue: u32, on: bool) -> Result<(), ChannelError> {
        self.channel.tell(Request::SetVringEnable, &words::<2, 8>(&[queue, on.into()]))
    }

    /// Takes the rings back. What the back end has under way is done when it answers.
    pub fn stop(&mut self, queues: &[u32]) -> Result<(), ChannelError> {
        for &queue in queues {
            if self.has_protocol() {
                self.enable(queue, false)?;
            }
            let request = Request::GetVringBase;
            let answer = self.channel.ask(request, &words::<2, 8>(&[queue, 0]))?;
            if answer.len() != 8 {
                let why = format!("{} bytes, not 8", answer.len());
                return Err(self.channel.give_up(ChannelError::Answer { request, why }));
            }
        }
        if self.protocol.contains(Protocol::RESET_DEVICE) {
            self.channel.tell(Request::ResetDevice, &[])?;
        }
        Ok(())
    }
}
