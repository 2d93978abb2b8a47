from xvd.dataplane.front.clients import ClientSet

class WaitingRoom(ClientSet):
    def give_up(self) -> None: ...
