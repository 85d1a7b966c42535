//! The threads that carry packets: at most one for two cores, since the apps whose packets they are need
//! the others; each with an event loop of its own.
//!
//! A node stays on the thread that it began on. Where several threads share a loop, as tokio's workers
//! do, whoever is idle waits in it, and is woken by each packet that another is about to take anyway.

use std::{
    convert::Infallible,
    io,
    sync::{Arc, Mutex, Once, PoisonError, Weak},
    thread,
    time::Duration,
};

use tokio::{
    runtime::{Builder, Handle},
    sync::oneshot,
};
use tracing::{debug, info};

/// For how long the kernel lets a carrier run before others have their turn. A short one is soon: who
/// asks for less at a time is let in earlier, and a carrier that waits while apps compute fills queues.
/// It is the least that the kernel grants (`SCHED_OTHER`, sched_setattr(2), Linux 6.12; older ones ignore
/// it).
const SLICE: Duration = Duration::from_micros(100);

/// The carriers of a process. Cheap to clone; all clones are the same.
#[derive(Clone, Debug, Default)]
pub struct Carriers(Arc<Mutex<Vec<Weak<Carrier>>>>);

/// One of them; it ends with the last node that holds it.
#[derive(Debug)]
pub(crate) struct Carrier {
    /// Where what it runs is spawned.
    pub runtime: Handle,
    _until_dropped: oneshot::Sender<Infallible>,
}

impl Carriers {
    /// The carrier of a new node: one of its own while there are fewer than there may be, else the one with
    /// the fewest nodes.
    pub(crate) fn take(&self) -> io::Result<Arc<Carrier>> {
        let most = most()?;
        // A panic elsewhere leaves the list whole: each change is one call.
        let mut carriers = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        carriers.retain(|carrier| carrier.strong_count() > 0);
        if carriers.len() >= most {
            let idlest = carriers.iter().min_by_key(|carrier| carrier.strong_count());
            if let Some(carrier) = idlest.and_then(Weak::upgrade) {
                return Ok(carrier);
            }
        }
        let carrier = Arc::new(Carrier::start()?);
        carriers.push(Arc::downgrade(&carrier));
        Ok(carrier)
    }
}

/// How many a process has.
fn most() -> io::Result<usize> {
    Ok(thread::available_parallelism()?.get().div_ceil(2))
}

impl Carrier {
    fn start() -> io::Result<Self> {
        let runtime = Builder::new_current_thread().enable_all().build()?;
        let handle = runtime.handle().clone();
        let (until_dropped, dropped) = oneshot::channel();
        thread::Builder::new()
            .name("carrier".into())
            .spawn(move || {
                be_let_in_soon();
                // Nothing is ever sent: this ends when the sender is dropped.
                let _ = runtime.block_on(dropped);
                debug!("a carrier ends");
            })?;
        Ok(Self {
            runtime: handle,
            _until_dropped: until_dropped,
        })
    }
}

/// Asks the kernel for short turns of this thread, and so for early ones.
fn be_let_in_soon() {
    static ONCE: Once = Once::new();
    if let Err(error) = set_slice(SLICE) {
        ONCE.call_once(|| info!(%error, "packets wait as long as apps for the processor"));
    }
}

/// Changes nothing else of how the thread is scheduled.
fn set_slice(slice: Duration) -> io::Result<()> {
    const THIS_THREAD: libc::pid_t = 0;
    const NO_FLAGS: libc::c_uint = 0;
    let mut attributes = libc::sched_attr {
        size: size_of::<libc::sched_attr>() as u32,
        sched_policy: 0,
        sched_flags: 0,
        sched_nice: 0,
        sched_priority: 0,
        sched_runtime: 0,
        sched_deadline: 0,
        sched_period: 0,
    };
    let checked = |status| match status {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    };
    // SAFETY: the kernel writes at most `size` bytes, which are `attributes`.
    checked(unsafe {
        libc::syscall(
            libc::SYS_sched_getattr,
            THIS_THREAD,
            &raw mut attributes,
            attributes.size,
            NO_FLAGS,
        )
    })?;
    if attributes.sched_policy != libc::SCHED_OTHER as u32 {
        // Whoever started us chose otherwise.
        return Ok(());
    }
    attributes.sched_runtime = slice.as_nanos() as u64;
    // SAFETY: the kernel reads `size` bytes, which are `attributes`.
    checked(unsafe {
        libc::syscall(
            libc::SYS_sched_setattr,
            THIS_THREAD,
            &raw const attributes,
            NO_FLAGS,
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nodes_are_spread_and_carriers_end_with_their_last_node() {
        let most = most().unwrap();
        let carriers = Carriers::default();
        let first: Vec<_> = (0..most).map(|_| carriers.take().unwrap()).collect();
        for (nth, one) in first.iter().enumerate() {
            let others = &first[nth + 1..];
            assert!(others.iter().all(|other| !Arc::ptr_eq(one, other)));
        }
        let second: Vec<_> = (0..most).map(|_| carriers.take().unwrap()).collect();
        for one in &first {
            let same = second.iter().filter(|other| Arc::ptr_eq(one, other));
            assert_eq!(same.count(), 1);
        }
        let task = first[0].runtime.spawn(std::future::pending::<()>());
        drop((first, second));
        let ended = Builder::new_current_thread()
            .build()
            .unwrap()
            .block_on(task);
        assert!(ended.unwrap_err().is_cancelled());
    }

    #[test]
    fn a_thread_may_ask_for_short_turns() {
        thread::spawn(|| set_slice(SLICE)).join().unwrap().unwrap();
    }
}
