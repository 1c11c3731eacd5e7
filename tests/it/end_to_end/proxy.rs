//! A network that can be slow, silent or cut: passes connections on to one address, as it is told.

use std::time::Duration;

use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::sleep;

/// What becomes of bytes on their way.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Weather {
    Clear,
    /// Each piece arrives this much later.
    Slow(Duration),
    /// Nothing arrives and nobody is told; what was sent meanwhile arrives when it is over.
    Silent,
}

#[derive(Clone, Copy)]
struct State {
    weather: Weather,
    /// Connections from before the last cut end.
    cuts: u64,
    /// With a reset instead of a farewell.
    reset: bool,
}

pub(super) struct Proxy {
    state: watch::Sender<State>,
    pub(super) address: String,
    _serving: JoinSet<()>,
}

impl Proxy {
    /// Listens there, with port 0 anywhere.
    pub(super) async fn start(listen: &str, upstream: &str) -> Self {
        let listener = TcpListener::bind(listen).await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let (state, seen) = watch::channel(State {
            weather: Weather::Clear,
            cuts: 0,
            reset: false,
        });
        let mut serving = JoinSet::new();
        serving.spawn(serve(listener, upstream.to_owned(), seen));
        Self {
            state,
            address,
            _serving: serving,
        }
    }

    pub(super) fn weather(&self, weather: Weather) {
        self.state.send_modify(|state| state.weather = weather);
    }

    /// Ends every connection; new ones are passed on.
    pub(super) fn cut(&self, reset: bool) {
        self.state.send_modify(|state| {
            state.cuts += 1;
            state.reset = reset;
        });
    }
}

async fn serve(listener: TcpListener, upstream: String, state: watch::Receiver<State>) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => if let Ok((client, _)) = accepted {
                connections.spawn(connection(client, upstream.clone(), state.clone()));
            },
            Some(_) = connections.join_next() => {}
        }
    }
}

async fn connection(client: TcpStream, upstream: String, state: watch::Receiver<State>) {
    // Where nobody listens the client is hung up on.
    let Ok(server) = TcpStream::connect(upstream).await else {
        return;
    };
    for stream in [&client, &server] {
        stream.set_nodelay(true).unwrap();
    }
    let reset = tokio::select! {
        () = pass(&client, &server, state.clone()) => false,
        () = pass(&server, &client, state.clone()) => false,
        reset = is_cut(state) => reset,
    };
    if reset {
        // With nothing to linger for, dropping the sockets sends a reset.
        let _ = (client.set_zero_linger(), server.set_zero_linger());
    }
}

async fn is_cut(mut state: watch::Receiver<State>) -> bool {
    let before = state.borrow().cuts;
    match state.wait_for(|state| state.cuts > before).await {
        Ok(state) => state.reset,
        Err(_) => false,
    }
}

/// One direction, to its end.
async fn pass(from: &TcpStream, to: &TcpStream, mut state: watch::Receiver<State>) {
    let mut buffer = vec![0; 32 * 1024];
    loop {
        let length = loop {
            if from.readable().await.is_err() {
                return;
            }
            match from.try_read(&mut buffer) {
                Ok(0) => return,
                Ok(length) => break length,
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
                Err(_) => return,
            }
        };
        let weather = match state.wait_for(|s| s.weather != Weather::Silent).await {
            Ok(state) => state.weather,
            Err(_) => return,
        };
        if let Weather::Slow(by) = weather {
            sleep(by).await;
        }
        let mut sent = 0;
        while sent < length {
            if to.writable().await.is_err() {
                return;
            }
            match to.try_write(&buffer[sent..length]) {
                Ok(written) => sent += written,
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
                Err(_) => return,
            }
        }
    }
}

#[tokio::test]
async fn the_proxy_passes_on_holds_back_and_cuts() {
    use tokio::time::timeout;

    async fn read(stream: &TcpStream) -> std::io::Result<usize> {
        loop {
            stream.readable().await?;
            match stream.try_read(&mut [0; 8]) {
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
                read => return read,
            }
        }
    }
    let upstream = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = upstream.local_addr().unwrap().to_string();
    let proxy = Proxy::start("127.0.0.1:0", &address).await;
    let client = TcpStream::connect(&proxy.address).await.unwrap();
    let (server, _) = upstream.accept().await.unwrap();
    client.try_write(b"one").unwrap();
    assert_eq!(read(&server).await.unwrap(), 3);
    proxy.weather(Weather::Silent);
    server.try_write(b"answer").unwrap();
    let held = timeout(Duration::from_millis(200), read(&client)).await;
    held.expect_err("it was passed on");
    proxy.weather(Weather::Slow(Duration::from_millis(20)));
    assert_eq!(read(&client).await.unwrap(), 6);
    proxy.cut(true);
    let error = read(&client).await.unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
}
