use std::{
    io::{self, Read, Write},
    net::{Shutdown, TcpListener, TcpStream},
    sync::{Arc, Mutex, PoisonError},
    thread,
};

use crate::Underlay;

/// Stands between a node and the server on the router's port, and does mischief when it is told
/// to: once, to the next bytes that the server sends.
pub struct Proxy {
    port: u16,
    next: Arc<Mutex<Option<Mischief>>>,
}

/// What may happen to bytes on their way.
#[derive(Clone, Copy)]
pub enum Mischief {
    /// Half of them arrive, and the connection ends.
    Cut,
    /// Others arrive.
    Garble,
    /// None arrive any more, and the connection stays.
    Stall,
}

impl Proxy {
    /// One before the server at `port`. It serves for as long as the test's process lives.
    pub fn start(underlay: &Underlay, port: u16) -> Proxy {
        let next = Arc::<Mutex<Option<Mischief>>>::default();
        let shared = next.clone();
        // Threads are in the namespace of the one that starts them.
        let listen = || {
            let listener = TcpListener::bind((Underlay::ROUTER, 0))?;
            let own = listener.local_addr()?.port();
            thread::spawn(move || {
                for client in listener.incoming().map_while(Result::ok) {
                    if let Ok(server) = TcpStream::connect((Underlay::ROUTER, port)) {
                        serve(client, server, shared.clone());
                    }
                }
            });
            Ok(own)
        };
        let port = underlay.router.run(listen).expect("start the proxy");
        Proxy { port, next }
    }

    /// The URL of the server behind it.
    pub fn url(&self) -> String {
        format!("http://{}:{}", Underlay::ROUTER, self.port)
    }

    /// Does so to the next bytes.
    pub fn does(&self, mischief: Mischief) {
        *self.next.lock().unwrap_or_else(PoisonError::into_inner) = Some(mischief);
    }

    /// Whether what it was told to do is done.
    pub fn is_done(&self) -> bool {
        let next = self.next.lock().unwrap_or_else(PoisonError::into_inner);
        next.is_none()
    }
}

fn serve(client: TcpStream, server: TcpStream, next: Arc<Mutex<Option<Mischief>>>) {
    let ends = || Ok::<_, io::Error>((client.try_clone()?, server.try_clone()?));
    let (mut from_client, mut to_server) = ends().expect("share the streams");
    thread::spawn(move || {
        // However it ends, the other way is told.
        let _ = io::copy(&mut from_client, &mut to_server);
        let _ = to_server.shutdown(Shutdown::Both);
    });
    thread::spawn(move || {
        let (mut server, mut client) = (server, client);
        let _ = forward(&mut server, &mut client, &next);
        let _ = client.shutdown(Shutdown::Both);
        let _ = server.shutdown(Shutdown::Both);
    });
}

fn forward(
    from: &mut TcpStream,
    to: &mut TcpStream,
    next: &Mutex<Option<Mischief>>,
) -> io::Result<()> {
    let mut buffer = [0; 16 << 10];
    loop {
        let length = from.read(&mut buffer)?;
        if length == 0 {
            return Ok(());
        }
        let bytes = &mut buffer[..length];
        let mischief = next.lock().unwrap_or_else(PoisonError::into_inner).take();
        match mischief {
            None => {}
            Some(Mischief::Cut) => return to.write_all(&bytes[..length / 2]),
            // The header of the frame stays, so that there is something to decrypt.
            Some(Mischief::Garble) => bytes.iter_mut().skip(3).for_each(|byte| *byte ^= 0x55),
            Some(Mischief::Stall) => {
                while from.read(&mut buffer)? != 0 {}
                return Ok(());
            }
        }
        to.write_all(&buffer[..length])?;
    }
}
