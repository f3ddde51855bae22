"""What uvicorn serves in a deployment; importing it makes this process a worker of the web."""

from fl_server.wsgi import application as wsgi  # sets Django up, which the others need

# isort: split
from fl_server.front.app import front
from fl_server.front.parent import end_with_parent
from fl_server.front.serving import frugal_malloc, load_views, many_files

end_with_parent()
frugal_malloc()
many_files()
load_views()
application = front(wsgi)
